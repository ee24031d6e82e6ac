//! JSON as Python writes it: templates show tools and arguments as `json.dumps` does.
//!
//! Members keep the order in which they were written, as in Python, which `serde_json::Value` does not do here.

use std::fmt::Write as _;

use minijinja::{Value, value::ValueKind};

/// How `json.dumps` is asked to write.
#[derive(Clone, Debug, Default)]
pub(crate) struct Style {
    /// Spaces of a level; `None`: one line.
    pub(crate) indent: Option<usize>,
    pub(crate) ensure_ascii: bool,
    pub(crate) sort_keys: bool,
    /// Between items, and after names, where the template says so.
    pub(crate) separators: Option<(String, String)>,
}

/// Writes a value; `None` if JSON has no such thing.
pub(crate) fn dump(value: &Value, style: &Style) -> Option<String> {
    let mut out = String::new();
    write_value(&mut out, value, style, 0)?;
    Some(out)
}

/// Levels of lists within lists.
const MAX_DEPTH: usize = 128;

fn write_value(out: &mut String, value: &Value, style: &Style, depth: usize) -> Option<()> {
    if depth > MAX_DEPTH {
        return None;
    }
    match value.kind() {
        ValueKind::None => out.push_str("null"),
        ValueKind::Bool => out.push_str(if value.is_true() { "true" } else { "false" }),
        ValueKind::Number if value.is_integer() => write!(out, "{value}").ok()?,
        ValueKind::Number => write_float(out, f64::try_from(value.clone()).ok()?),
        ValueKind::String => write_string(out, value.as_str()?, style.ensure_ascii),
        ValueKind::Seq | ValueKind::Iterable => {
            let items = value.try_iter().ok()?;
            write_items(out, style, depth, ('[', ']'), items, |out, item| write_value(out, &item, style, depth + 1))?;
        }
        ValueKind::Map => {
            let mut names: Vec<Value> = value.try_iter().ok()?.collect();
            if style.sort_keys {
                names.sort();
            }
            write_items(out, style, depth, ('{', '}'), names.into_iter(), |out, name| {
                match name.as_str() {
                    Some(text) => write_string(out, text, style.ensure_ascii),
                    None => write_string(out, &name.to_string(), style.ensure_ascii),
                }
                out.push_str(style.separators.as_ref().map_or(": ", |(_, colon)| colon.as_str()));
                write_value(out, &value.get_item(&name).ok()?, style, depth + 1)
            })?;
        }
        _ => return None,
    }
    Some(())
}

fn write_items(
    out: &mut String,
    style: &Style,
    depth: usize,
    (open, close): (char, char),
    items: impl Iterator<Item = Value>,
    mut write_item: impl FnMut(&mut String, Value) -> Option<()>,
) -> Option<()> {
    let comma = match (&style.separators, style.indent) {
        (Some((comma, _)), _) => comma.as_str(),
        (None, Some(_)) => ",",
        (None, None) => ", ",
    };
    let new_line = |out: &mut String, depth: usize| {
        if let Some(indent) = style.indent {
            out.push('\n');
            out.extend(std::iter::repeat_n(' ', indent * depth));
        }
    };
    out.push(open);
    let mut is_empty = true;
    for item in items {
        if !is_empty {
            out.push_str(comma);
        }
        is_empty = false;
        new_line(out, depth + 1);
        write_item(out, item)?;
    }
    if !is_empty {
        new_line(out, depth);
    }
    out.push(close);
    Some(())
}

/// As Python's `repr`: the shortest digits, with an exponent below 1e-4 and from 1e16 on.
fn write_float(out: &mut String, number: f64) {
    let size = number.abs();
    let written = if !number.is_finite() {
        (if number.is_nan() {
            "NaN"
        } else if number > 0.0 {
            "Infinity"
        } else {
            "-Infinity"
        })
        .to_owned()
    } else if size != 0.0 && !(1e-4..1e16).contains(&size) {
        let written = format!("{number:e}");
        let (digits, exponent) = written.split_once('e').unwrap_or((&written, "0"));
        let (sign, exponent) = exponent.strip_prefix('-').map_or(('+', exponent), |exponent| ('-', exponent));
        format!("{digits}e{sign}{exponent:0>2}")
    } else {
        format!("{number:?}")
    };
    out.push_str(&written);
}

fn write_string(out: &mut String, text: &str, ensure_ascii: bool) {
    out.push('"');
    for letter in text.chars() {
        match letter {
            '"' => out.push_str("\\\""),
            '\\' => out.push_str("\\\\"),
            '\n' => out.push_str("\\n"),
            '\r' => out.push_str("\\r"),
            '\t' => out.push_str("\\t"),
            '\u{8}' => out.push_str("\\b"),
            '\u{c}' => out.push_str("\\f"),
            letter if (letter as u32) < 0x20 || ensure_ascii && !letter.is_ascii() || ensure_ascii && letter == '\u{7f}' => {
                let mut units = [0; 2];
                for unit in letter.encode_utf16(&mut units) {
                    let _ = write!(out, "\\u{unit:04x}");
                }
            }
            letter => out.push(letter),
        }
    }
    out.push('"');
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(json: &str, style: &Style, expected: &str) {
        let value: Value = serde_json::from_str(json).unwrap();
        assert_eq!(dump(&value, style).as_deref(), Some(expected));
    }

    #[test]
    fn values_are_written_as_pythons_json_module_writes_them() {
        let plain = Style::default();
        check(r#"{"b":[1,2.0,-0.5,1e-7,1e16,1e22],"a":{}}"#, &plain, r#"{"b": [1, 2.0, -0.5, 1e-07, 1e+16, 1e+22], "a": {}}"#);
        check(r#"["é\n\u0001/<\ud83d\ude00",null,true,[]]"#, &plain, "[\"é\\n\\u0001/<😀\", null, true, []]");
        check(r#"["é😀"]"#, &Style { ensure_ascii: true, ..Style::default() }, r#"["\u00e9\ud83d\ude00"]"#);
        check(r#"{"b":1,"a":[]}"#, &Style { sort_keys: true, ..Style::default() }, r#"{"a": [], "b": 1}"#);
        let indented = Style { indent: Some(2), ..Style::default() };
        check(
            r#"{"b":[1,{"c":2}],"a":{}}"#,
            &indented,
            "{\n  \"b\": [\n    1,\n    {\n      \"c\": 2\n    }\n  ],\n  \"a\": {}\n}",
        );
        let tight = Style { separators: Some((",".to_owned(), ":".to_owned())), ..Style::default() };
        check(r#"{"b":[1,2]}"#, &tight, r#"{"b":[1,2]}"#);
    }
}
