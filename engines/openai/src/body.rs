//! Fields of ours in a client's body.
//!
//! Contract: a body is not re-modelled. Fields are written behind its opening brace, all else stays byte for byte; without
//! fields the very same bytes are sent. Since JSON readers take the last of two equal names, what a client wrote itself
//! wins. What is no JSON object is sent as it is, for the engine to refuse.

use std::fmt::{Display, Write as _};

use bytes::Bytes;

/// Fields to add, as JSON text.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Fields(String);

impl Fields {
    /// Adds a number.
    pub(crate) fn number(&mut self, name: &'static str, value: impl Into<i64>) {
        self.raw(name, value.into());
    }

    /// Adds a truth.
    pub(crate) fn flag(&mut self, name: &'static str, value: bool) {
        self.raw(name, value);
    }

    /// Adds a text that needs no escapes.
    pub(crate) fn plain_text(&mut self, name: &'static str, text: &str) {
        debug_assert!(text.bytes().all(|byte| byte.is_ascii_graphic() && !matches!(byte, b'"' | b'\\')), "{text} needs escapes");
        self.raw(name, format_args!("\"{text}\""));
    }

    fn raw(&mut self, name: &'static str, value: impl Display) {
        if !self.0.is_empty() {
            self.0.push(',');
        }
        write!(self.0, "\"{name}\":{value}").expect("a String takes all");
    }

    /// The body with the fields.
    pub(crate) fn into_body(self, body: Bytes) -> Bytes {
        let brace = body.iter().position(|byte| !byte.is_ascii_whitespace()).filter(|&at| body[at] == b'{');
        let Some(brace) = brace.filter(|_| !self.0.is_empty()) else { return body };
        let (opening, rest) = body.split_at(brace + 1);
        let is_empty = rest.iter().find(|byte| !byte.is_ascii_whitespace()) == Some(&b'}');
        let comma: &[u8] = if is_empty { b"" } else { b"," };
        [opening, self.0.as_bytes(), comma, rest].concat().into()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn with_two(body: &'static str) -> Bytes {
        let mut fields = Fields::default();
        fields.plain_text("rid", "r-1");
        fields.number("priority", -3);
        fields.into_body(body.into())
    }

    #[test]
    fn fields_come_first_and_the_rest_stays_as_it_was() {
        assert_eq!(with_two(r#"{ "a" : 1.50 }"#), r#"{"rid":"r-1","priority":-3, "a" : 1.50 }"#);
        assert_eq!(with_two("\n{\"a\":{}}"), "\n{\"rid\":\"r-1\",\"priority\":-3,\"a\":{}}");
        assert_eq!(with_two("{ }"), r#"{"rid":"r-1","priority":-3 }"#);
    }

    #[test]
    fn what_the_client_wrote_itself_wins() {
        let body: serde_json::Value = serde_json::from_slice(&with_two(r#"{"priority":7}"#)).unwrap();
        assert_eq!(body["priority"], 7);
    }

    #[test]
    fn nothing_to_add_is_the_same_bytes() {
        let body = Bytes::from_static(b"{\"a\":1}");
        let sent = Fields::default().into_body(body.clone());
        assert_eq!(sent.as_ptr(), body.as_ptr());
    }

    #[test]
    fn what_is_no_object_is_sent_as_it_is() {
        for body in ["", "  ", "[1]", "null", "\"{\""] {
            assert_eq!(with_two(body), body);
        }
    }
}
