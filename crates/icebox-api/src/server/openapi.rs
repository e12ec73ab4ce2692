//! The document that describes the routes, and how routes come to be in it: by [`Routes::add`], which takes what is said of
//! a route with its handler. So neither is there without the other.
//!
//! Schemas are made of the types themselves, as they are read: what a response may leave out is not required of it. Every
//! answer that is none of those named is an [`ErrorBody`].

use axum::Router;
use axum::handler::Handler;
use axum::routing::{MethodFilter, on};
use schemars::generate::SchemaSettings;
use schemars::{JsonSchema, Schema, SchemaGenerator};
use serde_json::{Map, Value, json};

use crate::{API_KEY_HEADER, ErrorBody};

/// Where components of a document are, as references name them.
const SCHEMAS: &str = "/components/schemas";

/// What operations are about, in the order to read about them.
const SUBJECTS: [&str; 4] = ["sandboxes", "templates", "teams and keys", "the daemon"];

type SchemaOf = fn(&mut SchemaGenerator) -> Schema;

/// What a message carries.
#[derive(Clone, Copy)]
enum Content {
    Nothing,
    Json(SchemaOf),
    /// JSON lines.
    Lines(SchemaOf),
    Bytes,
    Page,
}

/// What is said of a route with one method.
pub(super) struct Operation {
    filter: MethodFilter,
    method: &'static str,
    path: &'static str,
    summary: &'static str,
    query: Option<SchemaOf>,
    parameters: Vec<(&'static str, &'static str, Value)>,
    /// And whether it has to be there.
    body: Option<(Content, bool)>,
    answers: Vec<(u16, Content)>,
    is_open: bool,
    is_admins: bool,
    takes_preference: bool,
}

/// `GET` of a path: what is there, in a few words.
pub(super) fn get(path: &'static str, summary: &'static str) -> Operation {
    Operation::new(MethodFilter::GET, "get", path, summary)
}

/// `POST`, likewise.
pub(super) fn post(path: &'static str, summary: &'static str) -> Operation {
    Operation::new(MethodFilter::POST, "post", path, summary)
}

/// `PUT`, likewise.
pub(super) fn put(path: &'static str, summary: &'static str) -> Operation {
    Operation::new(MethodFilter::PUT, "put", path, summary)
}

/// `PATCH`, likewise.
pub(super) fn patch(path: &'static str, summary: &'static str) -> Operation {
    Operation::new(MethodFilter::PATCH, "patch", path, summary)
}

/// `DELETE`, likewise.
pub(super) fn delete(path: &'static str, summary: &'static str) -> Operation {
    Operation::new(MethodFilter::DELETE, "delete", path, summary)
}

impl Operation {
    fn new(
        filter: MethodFilter,
        method: &'static str,
        path: &'static str,
        summary: &'static str,
    ) -> Self {
        Self {
            filter,
            method,
            path,
            summary,
            query: None,
            parameters: Vec::new(),
            body: None,
            answers: Vec::new(),
            is_open: false,
            is_admins: false,
            takes_preference: false,
        }
    }

    /// Needs no key.
    pub(super) fn open(mut self) -> Self {
        self.is_open = true;
        self
    }

    /// Is for the host's administrator alone.
    pub(super) fn admins(mut self) -> Self {
        self.is_admins = true;
        self
    }

    /// Takes the fields of `T` as its query.
    pub(super) fn query<T: JsonSchema>(mut self) -> Self {
        self.query = Some(T::json_schema);
        self
    }

    /// Takes a parameter of its query that no type has.
    pub(super) fn parameter(mut self, name: &'static str, what: &'static str, of: Value) -> Self {
        self.parameters.push((name, what, of));
        self
    }

    /// Takes pages: how long, and after which.
    pub(super) fn pages(self) -> Self {
        self.parameter(
            "limit",
            "At most so many.",
            json!({"type": "integer", "minimum": 1, "maximum": 100, "default": 100}),
        )
        .parameter(
            "nextToken",
            "What the page before had as X-Next-Token.",
            json!({"type": "string"}),
        )
    }

    /// Needs a body.
    pub(super) fn body<T: JsonSchema>(mut self) -> Self {
        self.body = Some((Content::Json(of::<T>), true));
        self
    }

    /// May have a body, all of which has a default.
    pub(super) fn options<T: JsonSchema>(mut self) -> Self {
        self.body = Some((Content::Json(of::<T>), false));
        self
    }

    /// Takes a body of any bytes.
    pub(super) fn bytes(mut self) -> Self {
        self.body = Some((Content::Bytes, true));
        self
    }

    /// Answers `status` without a body.
    pub(super) fn nothing(self, status: u16) -> Self {
        self.answering(status, Content::Nothing)
    }

    /// Answers `status` with a `T`.
    pub(super) fn answers<T: JsonSchema>(self, status: u16) -> Self {
        self.answering(status, Content::Json(of::<T>))
    }

    /// Answers 200 with a `T` on each line.
    pub(super) fn lines<T: JsonSchema>(self) -> Self {
        self.answering(200, Content::Lines(of::<T>))
    }

    /// Answers 200 with bytes.
    pub(super) fn content(self) -> Self {
        self.answering(200, Content::Bytes)
    }

    /// Answers 200 with a page for people.
    pub(super) fn page(self) -> Self {
        self.answering(200, Content::Page)
    }

    /// Answers 200 with a `T` to those who prefer it.
    pub(super) fn prefers<T: JsonSchema>(mut self) -> Self {
        self.takes_preference = true;
        self.answers::<T>(200)
    }

    fn answering(mut self, status: u16, content: Content) -> Self {
        self.answers.push((status, content));
        self
    }

    fn described(&self, generator: &mut SchemaGenerator) -> Value {
        let mut parameters: Vec<Value> = variables(self.path)
            .map(|name| {
                json!({
                    "name": name, "in": "path", "required": true, "schema": {"type": "string", "minLength": 1},
                })
            })
            .collect();
        if let Some(query) = self.query {
            parameters.extend(fields(&query(generator)));
        }
        for (name, what, schema) in &self.parameters {
            parameters
                .push(json!({"name": name, "in": "query", "description": what, "schema": schema}));
        }
        if self.takes_preference {
            parameters.push(json!({
                "name": "Prefer", "in": "header", "description": "Has the sandbox in the answer, and no conflict.",
                "schema": {"enum": ["return=representation"]},
            }));
        }
        let mut answers = Map::new();
        for (status, content) in &self.answers {
            let mut answer = json!({"description": described_status(*status)});
            if let Some(content) = content.described(generator) {
                answer["content"] = content;
            }
            answers.insert(status.to_string(), answer);
        }
        answers.insert(
            "default".to_owned(),
            json!({"description": "An error", "content": Content::Json(of::<ErrorBody>).described(generator)}),
        );
        let mut operation = json!({
            "operationId": self.id(),
            "summary": self.summary,
            "tags": [self.tag()],
            "responses": answers,
        });
        if !parameters.is_empty() {
            operation["parameters"] = parameters.into();
        }
        if let Some((content, required)) = self.body {
            operation["requestBody"] =
                json!({"required": required, "content": content.described(generator)});
        }
        if self.is_open {
            operation["security"] = json!([]);
        }
        if self.is_admins {
            operation["description"] = "On the daemon's socket alone: 403 with a key.".into();
        }
        operation
    }

    fn id(&self) -> String {
        let words = self.path.split(|it: char| !it.is_ascii_alphanumeric());
        let words = std::iter::once(self.method).chain(words.filter(|word| !word.is_empty()));
        words.collect::<Vec<_>>().join("_")
    }

    /// What it is about, one of [`SUBJECTS`].
    fn tag(&self) -> &'static str {
        let mut words = self.path.split('/').filter(|word| !word.is_empty());
        let is_version = |word: &&str| !matches!(*word, "v2" | "v3");
        match words.find(is_version).unwrap_or_default() {
            "sandboxes" | "snapshots" | "events" => SUBJECTS[0],
            "templates" | "builds" | "uploads" | "kernels" => SUBJECTS[1],
            "teams" | "api-keys" | "audit" => SUBJECTS[2],
            _ => SUBJECTS[3],
        }
    }
}

impl Content {
    fn described(self, generator: &mut SchemaGenerator) -> Option<Value> {
        match self {
            Self::Nothing => None,
            Self::Json(of) => Some(json!({"application/json": {"schema": of(generator)}})),
            Self::Lines(of) => {
                // Of one line: no schema is of a stream.
                let line = of(generator);
                Some(json!({"application/x-ndjson": {"x-schema-of-line": line}}))
            }
            Self::Bytes => Some(json!({"application/octet-stream": {}})),
            Self::Page => Some(json!({"text/html": {}})),
        }
    }
}

fn of<T: JsonSchema>(generator: &mut SchemaGenerator) -> Schema {
    generator.subschema_for::<T>()
}

fn variables(path: &'static str) -> impl Iterator<Item = &'static str> {
    path.split('/')
        .filter_map(|segment| segment.strip_prefix('{')?.strip_suffix('}'))
}

/// The fields of an object as parameters of a query.
fn fields(object: &Schema) -> Vec<Value> {
    let object = object.as_value();
    let required: Vec<&Value> = object["required"]
        .as_array()
        .into_iter()
        .flatten()
        .collect();
    let fields = object["properties"].as_object().into_iter().flatten();
    fields
        .map(|(name, schema)| {
            let mut schema = schema.clone();
            let description = schema
                .as_object_mut()
                .and_then(|it| it.remove("description"));
            json!({
                "name": name, "in": "query", "required": required.contains(&&json!(name)),
                "description": description.unwrap_or_default(), "schema": schema,
            })
        })
        .collect()
}

fn described_status(status: u16) -> &'static str {
    http::StatusCode::from_u16(status)
        .ok()
        .and_then(|status| status.canonical_reason())
        .unwrap_or("Done")
}

/// Routes, and what is said of them.
#[derive(Default)]
pub(super) struct Routes {
    pub(super) router: Router,
    pub(super) operations: Vec<Operation>,
}

impl Routes {
    /// With another one.
    pub(super) fn add<H: Handler<T, ()>, T: 'static>(
        mut self,
        operation: Operation,
        handler: H,
    ) -> Self {
        let handler = on(operation.filter, handler);
        self.router = self.router.route(operation.path, handler);
        self.operations.push(operation);
        self
    }
}

/// OpenAPI 3.1 of these operations.
pub(super) fn document(operations: &[Operation]) -> Value {
    let settings = SchemaSettings::draft2020_12().with(|settings| {
        settings.definitions_path = SCHEMAS.into();
        settings.meta_schema = None;
    });
    let mut generator = settings.into_generator();
    let mut paths = Map::new();
    for operation in operations {
        let described = operation.described(&mut generator);
        let path = paths.entry(operation.path).or_insert_with(|| json!({}));
        path[operation.method] = described;
    }
    let schemas = generator.take_definitions(true);
    let mut document = json!({
        "openapi": "3.1.0",
        "info": {
            "title": "Icebox",
            "version": env!("CARGO_PKG_VERSION"),
            "description": "Sandboxes that are microVMs: E2B's API where that has one, and more in the same style.",
        },
        "servers": [{"url": "/"}],
        "security": [{"key": []}],
        "tags": SUBJECTS.map(|name| json!({"name": name})),
        "paths": paths,
        "components": {
            "schemas": schemas,
            "securitySchemes": {"key": {"type": "apiKey", "in": "header", "name": API_KEY_HEADER}},
        },
    });
    in_plain_words(&mut document);
    document
}

/// Descriptions are those of the types, and name each other by links that lead nowhere here.
fn in_plain_words(value: &mut Value) {
    match value {
        Value::Array(items) => items.iter_mut().for_each(in_plain_words),
        Value::Object(fields) => {
            for (name, value) in fields {
                match value {
                    Value::String(text) if name == "description" => *text = without_links(text),
                    value => in_plain_words(value),
                }
            }
        }
        _ => {}
    }
}

/// Without the brackets of links, and what they lead to.
fn without_links(text: &str) -> String {
    let mut plain = String::with_capacity(text.len());
    let mut rest = text;
    while let Some((before, link)) = rest.split_once("[`") {
        plain.push_str(before);
        let (name, after) = link.split_once("`]").unwrap_or((link, ""));
        plain.push_str(name);
        rest = match after.strip_prefix('(') {
            Some(target) => target.split_once(')').map_or("", |(_, after)| after),
            None => after,
        };
    }
    plain.push_str(rest);
    plain
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn links_lose_what_they_lead_to() {
        assert_eq!(
            without_links("As [`deny_out`](Self::deny_out) and [`State`] say (all)."),
            "As deny_out and State say (all)."
        );
        assert_eq!(without_links("plain [0, 1]"), "plain [0, 1]");
    }

    #[test]
    fn an_operation_is_named_by_what_it_does() {
        let operation = get("/v2/sandboxes/{sandboxID}/logs", "Logs");
        assert_eq!(operation.id(), "get_v2_sandboxes_sandboxID_logs");
        assert_eq!(operation.tag(), "sandboxes");
        assert_eq!(post("/builds", "Builds").tag(), "templates");
        assert_eq!(get("/docs", "This").tag(), "the daemon");
        assert_eq!(variables(operation.path).collect::<Vec<_>>(), ["sandboxID"]);
    }
}
