// The fields of each path, from /openapi.json.
function element(name, text) {
  const made = document.createElement(name);
  if (text !== undefined) made.textContent = text;
  return made;
}

function kind(schema) {
  if (schema.anyOf) return schema.anyOf.map(kind).join(" or ");
  if (schema.enum) return schema.enum.join(", ");
  if (schema.type === "array") return `list of ${kind(schema.items)}`;
  const { minimum: low, maximum: high } = schema;
  const range = low === undefined && high === undefined ? "" : ` ${low ?? ""} … ${high ?? ""}`;
  return (schema.type ?? "any") + range;
}

function row(cells, name) {
  const made = element("tr");
  made.append(...cells.map((cell) => element(name, cell)));
  return made;
}

const api = await (await fetch("/openapi.json")).json();
document.getElementById("title").textContent = api.info.title;
for (const [path, methods] of Object.entries(api.paths)) {
  for (const [method, operation] of Object.entries(methods)) {
    const section = element("section");
    section.append(element("h2", `${method.toUpperCase()} ${path}`), element("p", operation.summary));
    const schema = operation.requestBody?.content["application/json"].schema;
    if (schema) {
      const table = element("table");
      table.append(row(["field", "values", "default", "meaning"], "th"));
      for (const [name, field] of Object.entries(schema.properties)) {
        const first = schema.required.includes(name) ? "required" : String(field.default ?? "");
        table.append(row([name, kind(field), first, field.description ?? ""], "td"));
      }
      section.append(table);
    }
    document.getElementById("paths").append(section);
  }
}
