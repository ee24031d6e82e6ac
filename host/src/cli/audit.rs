//! `dynamo-host audit`: what was changed in a running host.
#![allow(clippy::print_stdout)]

use bytes::Bytes;
use http::Method;
use serde_json::Value;

use super::{
    AdminFlags, Output,
    admin::{call, list_of, text},
};
use crate::text::plain;

pub(super) async fn list(last: u32, admin: &AdminFlags, output: Output) -> Result<(), String> {
    let answer = call(admin, Method::GET, &format!("/v1/audit?last={last}"), Bytes::new()).await?;
    if output == Output::Json {
        println!("{answer:#}");
        return Ok(());
    }
    for entry in list_of(&answer["entries"]) {
        let of = entry["of"].as_str().map(|of| format!(" {}", plain(of))).unwrap_or_default();
        println!("{}  {}{of}: {}, by {}", text(&entry["at"]), text(&entry["what"]), result(entry), who(&entry["who"]));
    }
    Ok(())
}

/// What has changed, or why nothing has.
fn result(entry: &Value) -> String {
    if entry["refused"].is_string() {
        return format!("refused, {}", text(&entry["refused"]));
    }
    let (from, to) = (&entry["from"], &entry["to"]);
    let Some(fields) = to.as_object().filter(|_| from.is_object()) else {
        return if to.is_null() { "done".to_owned() } else { plain(&to.to_string()) };
    };
    let changed = fields.iter().filter(|(field, now)| from[field.as_str()] != **now);
    let changed: Vec<_> =
        changed.map(|(field, now)| format!("{field} {} → {}", short(&from[field.as_str()]), short(now))).collect();
    if changed.is_empty() { "no change".to_owned() } else { changed.join(", ") }
}

fn short(value: &Value) -> String {
    match value {
        Value::Null => "none".to_owned(),
        // A digest, of which the beginning tells enough.
        Value::String(digest) if digest.len() == 64 => digest[..8].to_owned(),
        Value::String(string) => plain(string),
        other => plain(&other.to_string()),
    }
}

fn who(who: &Value) -> String {
    let client = &who["client"];
    if let Some(how) = who["system"].as_str() {
        return plain(how);
    }
    if !client.is_object() {
        return "the host".to_owned();
    }
    let peer = text(&client["peer"]);
    let token = if client["token"] == true { " with the admin token" } else { "" };
    let certificate = client["certificate"].as_str().map(|shown| format!(" with certificate {}", plain(shown)));
    format!("{peer}{token}{}", certificate.unwrap_or_default())
}
