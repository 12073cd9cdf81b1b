// How values are written for people.

/** DICOM's "Doe^Jane^^Dr" as "Doe, Jane". */
export function personName(name) {
  if (!name) return "";
  const [family, given, middle] = name.split("=")[0].split("^");
  const rest = [given, middle].filter(Boolean).join(" ");
  return [family, rest].filter(Boolean).join(", ");
}

export function patient(study) {
  return personName(study.patient_name) || study.patient_id || "No name";
}

/** What the study is called where it has no description. */
export function title(study) {
  return study.description || study.source || "Untitled study";
}

const DAY = new Intl.DateTimeFormat(undefined, { year: "numeric", month: "short", day: "2-digit" });
const MOMENT = new Intl.DateTimeFormat(undefined, { month: "short", day: "2-digit", hour: "2-digit", minute: "2-digit", hourCycle: "h23" });

/** A DICOM date (YYYYMMDD) or an ISO one. */
export function date(text) {
  if (!text) return "";
  const match = /^(\d{4})-?(\d{2})-?(\d{2})/.exec(text);
  return match ? DAY.format(new Date(+match[1], +match[2] - 1, +match[3])) : text;
}

export function moment(text) {
  return text ? MOMENT.format(new Date(text)) : "";
}

export function grid(shape) {
  return shape?.length ? shape.join(" × ") : "";
}

export function spacing(mm) {
  return mm?.length ? `${mm.map((value) => value.toFixed(value < 1 ? 2 : 1)).join(" × ")} mm` : "";
}

export function percent(value) {
  return `${Math.round(value * 100)}%`;
}

export function bytes(count) {
  const units = ["B", "kB", "MB", "GB"];
  let step = 0;
  while (count >= 1000 && step < units.length - 1) [count, step] = [count / 1000, step + 1];
  return `${count.toFixed(step && count < 10 ? 1 : 0)} ${units[step]}`;
}

/** A position in patient coordinates (LPS), as "L 34.2  P 12.0  S 88.1 mm". */
export function position([x, y, z]) {
  const part = (value, plus, minus) => `${value >= 0 ? plus : minus} ${Math.abs(value).toFixed(1)}`;
  return `${part(x, "L", "R")}  ${part(y, "P", "A")}  ${part(z, "S", "I")} mm`;
}

/** A true minus sign, so that the figures line up. */
export function signed(value) {
  return String(Math.round(value)).replace("-", "−");
}

export function count(number, one, many = `${one}s`) {
  return `${number} ${number === 1 ? one : many}`;
}
