"""Prompt embeddings, continued by the plain language model, give the words that ours gives."""

from __future__ import annotations

import base64
import io
import json
import socket
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer, Qwen2ForCausalLM

from med3dvlm import engines, hub
from tests.models import tiny

QUESTIONS = ["Which side?", "Is there effusion? left right both"]


@pytest.fixture(scope="module", params=["placeholder", "published"])
def exported(request, tmp_path_factory):
    """A model, and the folder of its export, with either layout of prompts."""
    model = tiny.vlm(prompt_layout=request.param)
    folder = tmp_path_factory.mktemp("export") / "engine"
    engines.export_for_engines(model, folder)
    return model, folder


def test_the_reader_and_the_plain_language_model_together_are_the_model(exported):
    model, folder = exported
    plain = Qwen2ForCausalLM.from_pretrained(folder / "language_model").eval()
    reader = hub.load(folder / "reader", device="cpu")
    words = AutoTokenizer.from_pretrained(folder / "language_model")
    weights = load_file(folder / "reader" / "model.safetensors")
    assert not [name for name in weights if ".layers." in name and "language" in name]
    for number, question in enumerate(QUESTIONS):
        embeddings = reader.prompt_embeddings(tiny.scan(number), question)
        torch.testing.assert_close(
            embeddings, model.prompt_embeddings(tiny.scan(number), question), rtol=1e-4, atol=1e-5
        )
        assert embeddings.shape == (len(model.processor.prompt_tokens([question])[0]), 32)
        with torch.inference_mode():
            new = plain.generate(
                inputs_embeds=embeddings[None], max_new_tokens=12, do_sample=False
            )[0]
            prompt = model.processor.prompt_tokens([question])
            expected = model._generate(model.see(tiny.scan(number)), prompt, max_new_tokens=12)[0][
                0
            ]
        assert new.tolist() == expected
        assert words.decode(new) == model.processor.tokenizer.decode(expected)


class Server(ThreadingHTTPServer):
    """What the documentation of vLLM and of SGLang says of their servers, over a plain model."""

    def __init__(self, model, words):
        super().__init__(("127.0.0.1", 0), Handler)
        self.model, self.words = model, words

    def continued(self, embeddings: torch.Tensor, tokens: int) -> str:
        with torch.inference_mode():
            new = self.model.generate(
                inputs_embeds=embeddings[None], max_new_tokens=tokens, do_sample=False
            )[0]
        return self.words.decode(new, skip_special_tokens=True)


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path == "/v1/completions":
            if body["model"] != "language_model" or body["temperature"] != 0:
                return self.send(404, {"error": "no such model"})
            file = io.BytesIO(base64.b64decode(body["prompt_embeds"], validate=True))
            embeddings = torch.load(file, weights_only=True)
            text = self.server.continued(embeddings, body["max_tokens"])
            return self.send(200, {"choices": [{"text": text}]})
        assert self.path == "/generate" and body["sampling_params"]["temperature"] == 0
        tokens = body["sampling_params"]["max_new_tokens"]
        return self.send(
            200, {"text": self.server.continued(torch.tensor(body["input_embeds"]), tokens)}
        )

    def send(self, code, answer):
        self.send_response(code)
        self.end_headers()
        self.wfile.write(json.dumps(answer).encode())

    def log_message(self, *_):
        pass


def test_a_request_gets_the_words_of_the_model(exported):
    model, folder = exported
    plain = Qwen2ForCausalLM.from_pretrained(folder / "language_model").eval()
    server = Server(plain, AutoTokenizer.from_pretrained(folder / "language_model"))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}/"
    try:
        embeddings = model.prompt_embeddings(tiny.scan(), QUESTIONS[0])
        expected = model.ask(tiny.scan(), QUESTIONS[0], max_new_tokens=12)
        for engine in engines.ENGINES:
            written = engines.complete(embeddings, url, engine=engine, max_new_tokens=12)
            assert written == expected
        with pytest.raises(engines.EngineError, match=r"refused \(404\).*no such model"):
            engines.complete(embeddings, url, model="other")
    finally:
        server.shutdown()
        server.server_close()
    with pytest.raises(engines.EngineError, match="start it first"):
        engines.complete(embeddings, url)
    with pytest.raises(ValueError, match="choose one of vllm, sglang"):
        engines.complete(embeddings, url, engine="other")


@pytest.mark.parametrize("answer", [b"", b"HTTP/1.1 200 OK\r\nContent-Length: 99\r\n\r\n{"])
def test_a_server_that_dies_while_it_answers_is_an_error_of_the_engine(answer):
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def die():
            connection, _ = listening.accept()
            connection.recv(2**20)
            connection.sendall(answer)
            connection.close()

        threading.Thread(target=die, daemon=True).start()
        url = f"http://127.0.0.1:{listening.getsockname()[1]}"
        with pytest.raises(engines.EngineError, match="no vllm answers"):
            engines.complete(torch.zeros(1, 4), url, timeout=10)
