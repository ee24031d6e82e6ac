//! A policy's settings for people: from a JSON Schema to lines of name, type, default and meaning.

use serde_json::Value;

use crate::text::plain;

/// Depth of nested settings that is shown.
const MAX_DEPTH: usize = 4;

/// One line per setting; nested ones by their path. Empty if there are none.
pub(super) fn lines(schema: &Value) -> Vec<String> {
    let mut lines = Vec::new();
    add(schema, schema, "", &Value::Null, MAX_DEPTH, &mut lines);
    let width = lines.iter().map(|(name, ..)| name.chars().count()).max().unwrap_or(0);
    lines.into_iter().map(|(name, kind, meaning)| plain(format!("{name:width$}  {kind}  {meaning}").trim_end())).collect()
}

/// Adds the properties of `schema`. `defaults` is the default of the object that they belong to.
fn add(root: &Value, schema: &Value, path: &str, defaults: &Value, depth: usize, lines: &mut Vec<(String, String, String)>) {
    let schema = resolved(root, schema);
    let Some(properties) = schema["properties"].as_object() else { return };
    let required = schema["required"].as_array().map(Vec::as_slice).unwrap_or_default();
    for (name, property) in properties {
        let path = if path.is_empty() { name.clone() } else { format!("{path}.{name}") };
        let default = property.get("default").or_else(|| defaults.get(name)).cloned().unwrap_or_default();
        let target = resolved(root, property);
        if depth > 0 && target["properties"].is_object() {
            add(root, target, &path, &default, depth - 1, lines);
            continue;
        }
        let stated = match &default {
            Value::Null if required.iter().any(|key| key == name.as_str()) => ", required".to_owned(),
            Value::Null => String::new(),
            default => format!(", default {default}"),
        };
        let meaning = property["description"].as_str().or_else(|| target["description"].as_str()).unwrap_or_default();
        lines.push((path, format!("({}{stated})", kind(root, target)), meaning.to_owned()));
    }
}

/// Follows a reference within the schema.
fn resolved<'a>(root: &'a Value, schema: &'a Value) -> &'a Value {
    let pointer = schema["$ref"].as_str().and_then(|reference| reference.strip_prefix('#'));
    pointer.and_then(|pointer| root.pointer(pointer)).unwrap_or(schema)
}

/// The type in a word or two; of a choice, its words.
fn kind(root: &Value, schema: &Value) -> String {
    if let Some(words) = schema["enum"].as_array() {
        return words.iter().map(Value::to_string).collect::<Vec<_>>().join(" | ");
    }
    if let Some(word) = schema.get("const") {
        return word.to_string();
    }
    if let Some(choices) = schema["oneOf"].as_array().or_else(|| schema["anyOf"].as_array()) {
        return choices.iter().map(|choice| kind(root, resolved(root, choice))).collect::<Vec<_>>().join(" | ");
    }
    if let Some(types) = schema["type"].as_array() {
        return types.iter().filter_map(Value::as_str).collect::<Vec<_>>().join(" | ");
    }
    match schema["type"].as_str() {
        Some("array") => format!("array of {}", kind(root, resolved(root, &schema["items"]))),
        Some("object") => match schema["properties"].as_object() {
            Some(properties) => format!("{{{}}}", properties.keys().map(String::as_str).collect::<Vec<_>>().join(", ")),
            None => "object".to_owned(),
        },
        Some(kind) => kind.to_owned(),
        None => "any".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn settings_are_told_by_name_type_default_and_meaning() {
        let schema = json!({
            "properties": {
                "weights": { "$ref": "#/$defs/Weights", "default": { "queue": 0.5 } },
                "key": { "oneOf": [{ "const": "session", "type": "string" }, { "enum": ["prefix"] }], "default": "session" },
                "labels": { "type": "array", "items": { "$ref": "#/$defs/Label" }, "default": [] },
                "limit": { "type": ["integer", "null"] },
                "name": { "type": "string", "description": "Who it is." }
            },
            "required": ["name"],
            "$defs": {
                "Weights": { "type": "object", "properties": { "queue": { "type": "number", "description": "Few that wait." } } },
                "Label": { "type": "object", "properties": { "key": { "type": "string" }, "value": {} } }
            }
        });
        let expected = [
            "key            (\"session\" | \"prefix\", default \"session\")",
            "labels         (array of {key, value}, default [])",
            "limit          (integer | null)",
            "name           (string, required)  Who it is.",
            "weights.queue  (number, default 0.5)  Few that wait.",
        ];
        let mut lines = lines(&schema);
        lines.sort();
        assert_eq!(lines, expected);
    }

    #[test]
    fn what_is_no_schema_has_no_lines() {
        for schema in [Value::Null, json!({}), json!({ "properties": {} }), json!([1])] {
            assert!(lines(&schema).is_empty(), "{schema}");
        }
    }

    #[test]
    fn a_schema_that_contains_itself_ends() {
        let schema = json!({ "properties": { "a": { "$ref": "#" } } });
        assert!(lines(&schema).len() <= 1);
    }
}
