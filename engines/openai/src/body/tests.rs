//! What is added, what is cut, and what stays.

use super::*;

fn with_two(body: &'static str) -> Bytes {
    let mut fields = Fields::default();
    fields.plain_text("rid", "r-1");
    fields.number("priority", -3);
    fields.into_body(body.into())
}

fn one_token(body: &'static str) -> Bytes {
    let mut fields = Fields::default();
    fields.instead("max_tokens", 1);
    fields.without("stream_options");
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
        assert_eq!(one_token(body), body);
    }
    for body in ["{", "{\"a\":1}}", "{\"a\":1} x", "{\"a\"}"] {
        assert_eq!(one_token(body), body);
    }
}

#[test]
fn what_stands_instead_wins_and_the_rest_stays_as_it_was() {
    assert_eq!(one_token(r#"{"max_tokens":9}"#), r#"{"max_tokens":1}"#);
    assert_eq!(one_token("{}"), r#"{"max_tokens":1}"#);
    assert_eq!(
        one_token(r#" { "a" : 1.50 , "max_tokens": 9, "b":"\u00e9\"," ,  "c":[ {} ], "stream_options":{"max_tokens":3} } "#),
        r#"{"max_tokens":1,"a" : 1.50,"b":"\u00e9\"," ,  "c":[ {} ]}"#
    );
}

#[test]
fn a_field_is_cut_as_often_as_it_is_there_and_however_it_is_spelled() {
    let body = r#"{"max_tokens":9,"max\u005ftokens":8,"stream_options":1,"a":{"max_tokens":7},"stream_options":2}"#;
    assert_eq!(one_token(body), r#"{"max_tokens":1,"a":{"max_tokens":7}}"#);
}

#[test]
fn ids_are_written_as_a_list() {
    let mut fields = Fields::default();
    fields.ids_instead("prompt", &[7, 0, u32::MAX]);
    assert_eq!(fields.into_body(Bytes::from_static(br#"{"prompt":"a text"}"#)), r#"{"prompt":[7,0,4294967295]}"#);
}

proptest::proptest! {
    /// Whatever the object, what is cut is gone, what is kept has its value, and the text is its own.
    #[test]
    fn cutting_keeps_every_other_member(
        names in proptest::collection::vec("[a-c\"\\\\é{},: ]{0,4}", 0..8),
        spaces in "[ \n\t]{0,3}",
    ) {
        let member = |(at, name): (usize, &String)| format!("{spaces}{}{spaces}:{spaces}[{at},\"}}\"]{spaces}", serde_json::json!(name));
        let body = format!("{spaces}{{{}}}", names.iter().enumerate().map(member).collect::<Vec<_>>().join(","));
        let mut fields = Fields::default();
        fields.instead("a", 1);
        fields.without("b");
        let cut: serde_json::Value = serde_json::from_slice(&fields.into_body(body.clone().into())).unwrap();
        let mut expected: serde_json::Value = serde_json::from_str(&body).unwrap();
        expected.as_object_mut().unwrap().remove("b");
        expected["a"] = 1.into();
        proptest::prop_assert_eq!(cut, expected);
    }
}
