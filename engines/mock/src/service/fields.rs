//! Fields: the typed members of a JSON request, with complaints in the words of Pydantic, which vLLM passes on.
//!
//! Like Pydantic, a reader goes on after a wrong field, so that a client hears of all of them at once.

use serde_json::{Map, Value};

use super::error::ApiError;

/// A request body's members.
#[derive(Debug)]
pub(super) struct Fields {
    members: Map<String, Value>,
    first_wrong: Option<String>,
    errors: Vec<String>,
}

impl Fields {
    /// Parses a body.
    ///
    /// # Errors
    /// If it is not a JSON object.
    pub(super) fn parse(body: &[u8]) -> Result<Self, ApiError> {
        match serde_json::from_slice(body) {
            Ok(Value::Object(members)) => Ok(Self { members, first_wrong: None, errors: Vec::new() }),
            Ok(other) => {
                let input = python(&other);
                let error = format!(
                    "{{'type': 'dict_type', 'loc': 'body', 'msg': 'Input should be a valid dictionary', 'input': {input}}}"
                );
                Err(ApiError::invalid("body".to_owned(), &[error]))
            }
            Err(error) => Err(json_invalid(body, &error)),
        }
    }

    /// Ends the reading.
    ///
    /// # Errors
    /// If any field was wrong.
    pub(super) fn finish(self) -> Result<(), ApiError> {
        match self.first_wrong {
            Some(param) => Err(ApiError::invalid(param, &self.errors)),
            None => Ok(()),
        }
    }

    /// A member that is there and not null, out of the body.
    pub(super) fn take(&mut self, name: &str) -> Option<Value> {
        self.members.remove(name).filter(|value| !value.is_null())
    }

    /// The role of the last message under `name`.
    pub(super) fn last_role(&self, name: &str) -> Option<&str> {
        self.members.get(name)?.as_array()?.last()?.get("role")?.as_str()
    }

    pub(super) fn string(&mut self, name: &str) -> Option<String> {
        match self.take(name)? {
            Value::String(text) => Some(text),
            other => self.wrong(name, "string_type", "Input should be a valid string", &other),
        }
    }

    /// False if it is not there.
    pub(super) fn boolean(&mut self, name: &str) -> bool {
        self.boolean_or(name, false)
    }

    pub(super) fn boolean_or(&mut self, name: &str, default: bool) -> bool {
        match self.take(name) {
            None => default,
            Some(Value::Bool(value)) => value,
            Some(other) => self.wrong(name, "bool_type", "Input should be a valid boolean", &other).unwrap_or_default(),
        }
    }

    pub(super) fn integer(&mut self, name: &str) -> Option<i64> {
        let value = self.take(name)?;
        match &value {
            Value::Number(number) => match number.as_i64() {
                Some(integer) => Some(integer),
                None if number.as_f64().is_some_and(|float| float.fract() == 0.0) => number.as_f64().map(|float| float as i64),
                None => self.wrong(
                    name,
                    "int_from_float",
                    "Input should be a valid integer, got a number with a fractional part",
                    &value,
                ),
            },
            Value::String(text) => match text.trim().parse() {
                Ok(integer) => Some(integer),
                Err(_) => self.wrong(
                    name,
                    "int_parsing",
                    "Input should be a valid integer, unable to parse string as an integer",
                    &value,
                ),
            },
            _ => self.wrong(name, "int_type", "Input should be a valid integer", &value),
        }
    }

    pub(super) fn number(&mut self, name: &str) -> Option<f64> {
        let value = self.take(name)?;
        match &value {
            Value::Number(number) => number.as_f64(),
            Value::String(text) => match text.trim().parse() {
                Ok(number) => Some(number),
                Err(_) => self.wrong(
                    name,
                    "float_parsing",
                    "Input should be a valid number, unable to parse string as a number",
                    &value,
                ),
            },
            _ => self.wrong(name, "float_type", "Input should be a valid number", &value),
        }
    }

    pub(super) fn list(&mut self, name: &str) -> Option<Vec<Value>> {
        match self.take(name)? {
            Value::Array(items) => Some(items),
            other => self.wrong(name, "list_type", "Input should be a valid list", &other),
        }
    }

    /// Notes that a field that must be there is not.
    pub(super) fn missing(&mut self, name: &str) {
        let body = Value::Object(self.members.clone());
        self.wrong::<()>(name, "missing", "Field required", &body);
    }

    /// Notes what is wrong with a field; returns `None`, to stand for its value.
    pub(super) fn wrong<T>(&mut self, name: &str, kind: &str, message: &str, input: &Value) -> Option<T> {
        let place = format!("body.{name}");
        self.errors.push(format!("{{'type': '{kind}', 'loc': '{place}', 'msg': '{message}', 'input': {}}}", python(input)));
        self.first_wrong.get_or_insert(place);
        None
    }
}

/// A body that is not JSON. Python counts characters where serde counts lines and columns.
fn json_invalid(body: &[u8], error: &serde_json::Error) -> ApiError {
    let lines_before = body.split_inclusive(|&byte| byte == b'\n').take(error.line().saturating_sub(1));
    let position = lines_before.map(<[u8]>::len).sum::<usize>() + error.column().saturating_sub(1);
    let words = error.to_string();
    let words = match words.split(" at line").next() {
        Some("key must be a string") => "Expecting property name enclosed in double quotes",
        Some(words) => words,
        None => "",
    };
    let place = format!("body.{position}");
    let words = python(&Value::from(words));
    let error = format!(
        "{{'type': 'json_invalid', 'loc': '{place}', 'msg': 'JSON decode error', \
         'input': '<dict of 0 items>', 'ctx': {{'error': {words}}}}}"
    );
    ApiError::invalid(place, &[error])
}

/// A value as Python would print it; collections only by size, as vLLM does.
fn python(value: &Value) -> String {
    match value {
        Value::Null => "None".to_owned(),
        Value::Bool(true) => "True".to_owned(),
        Value::Bool(false) => "False".to_owned(),
        Value::Number(number) => number.to_string(),
        Value::String(text) => format!("'{}'", text.replace('\\', "\\\\").replace('\'', "\\'").replace('\n', "\\n")),
        Value::Array(items) => format!("'<list of {} items>'", items.len()),
        Value::Object(members) => format!("'<dict of {} items>'", members.len()),
    }
}
