"""What is counted, for Prometheus."""

from __future__ import annotations

from prometheus_client import Counter, Gauge, Histogram

REQUESTS = Counter("med3dvlm_http_requests", "Requests answered.", ["method", "route", "status"])
SECONDS = Histogram(
    "med3dvlm_http_seconds",
    "Seconds until the head of an answer.",
    ["route"],
    buckets=(0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30),
)
STREAMS = Gauge("med3dvlm_event_streams", "Event streams that are open.")
JOB_SECONDS = Histogram(
    "med3dvlm_job_seconds",
    "Seconds of work on a job, in this process.",
    ["kind"],
    buckets=(0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300),
)
TOKENS = Counter("med3dvlm_tokens", "Tokens written by the model, in this process.")
RESULTS = Counter("med3dvlm_results", "Results by where they came from.", ["kind", "source"])
JOBS = Gauge("med3dvlm_jobs", "Jobs of the last day, by kind and state.", ["kind", "state"])
QUEUED = Gauge("med3dvlm_jobs_queued", "Jobs that wait.")
STUDIES = Gauge("med3dvlm_studies", "Studies, by state.", ["state"])
WORKERS = Gauge("med3dvlm_workers", "Workers that are alive.")
