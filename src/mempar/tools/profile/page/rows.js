
"use strict";
// The table of rows: sorted by a click on a head, filtered by words, a hundred rows at a time.
const { fields, rows } = JSON.parse(document.getElementById("rows-data").textContent);
const table = document.getElementById("rows"), filter = document.getElementById("filter");
const more = document.getElementById("more"), shown = document.getElementById("shown");
const heads = [...table.tHead.rows[0].cells];
const TEXTS = new Set(["phase", "group"]), SUMS = new Set(["calls", "bytes_predicted", "bytes_measured", "microseconds", "exposed_us", "overlapped_us"]);
const PART = 100;
let order = null, limit = PART, found = rows;

function written(value, field) {
  if (value === null) return "–";
  if (typeof value === "string") return value;
  if (["rank", "step", "layer"].includes(field)) return String(value);
  return value.toLocaleString("en-US", { maximumFractionDigits: field.endsWith("gb_per_s") ? 3 : 1 });
}

function cell(row, value, field) {
  const made = row.insertCell();
  made.textContent = written(value, field);
  if (!TEXTS.has(field)) made.className = "number";
}

// Every word must be met: field=value exactly, any other within the phase or the group.
function matcher(text) {
  const words = text.toLowerCase().split(/\s+/).filter(Boolean).map((word) => {
    const [name, value] = word.split(/=(.*)/s), place = fields.indexOf(name);
    if (value !== undefined && place >= 0) return (row) => value === "" || String(row[place]).toLowerCase() === value;
    return (row) => fields.some((field, at) => TEXTS.has(field) && row[at].toLowerCase().includes(word));
  });
  return (row) => words.every((meets) => meets(row));
}

function compare(place, sign) {
  return (one, other) => {
    const [a, b] = [one[place], other[place]];
    if (a === b) return 0;
    // What is not there comes last, either way.
    if (a === null || b === null) return a === null ? 1 : -1;
    return a < b ? -sign : sign;
  };
}

function fill() {
  const body = document.createElement("tbody");
  for (const row of found.slice(0, limit)) {
    const line = body.insertRow();
    row.forEach((value, at) => cell(line, value, fields[at]));
  }
  table.tBodies[0].replaceWith(body);
  more.hidden = found.length <= limit;
  shown.textContent = `${Math.min(limit, found.length).toLocaleString("en-US")} of ${found.length.toLocaleString("en-US")} rows shown`;
}

function update() {
  found = rows.filter(matcher(filter.value));
  if (order) found.sort(compare(order.place, order.sign));
  limit = PART;
  const foot = document.createElement("tfoot"), line = foot.insertRow();
  fields.forEach((field, at) => cell(line, SUMS.has(field) ? found.reduce((sum, row) => sum + (row[at] ?? 0), 0) : at ? "" : "sum", field));
  table.tFoot.replaceWith(foot);
  fill();
}

heads.forEach((head, place) => {
  if (!TEXTS.has(fields[place])) head.className = "number";
  head.firstChild.addEventListener("click", () => {
    // Numbers from the largest first, names from A.
    const first = TEXTS.has(fields[place]) || place < 3 ? 1 : -1;
    order = { place, sign: order && order.place === place ? -order.sign : first };
    heads.forEach((other) => other.removeAttribute("aria-sort"));
    head.setAttribute("aria-sort", order.sign > 0 ? "ascending" : "descending");
    update();
  });
});
filter.addEventListener("input", update);
more.addEventListener("click", () => { limit += 10 * PART; fill(); });
update();
