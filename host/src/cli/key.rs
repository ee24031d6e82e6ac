//! `dynamo-host key`.
#![allow(clippy::print_stdout)]

use serde::Serialize;

use super::NewKeyFlags;
use crate::auth::NewKey;

/// Prints a new key on stderr and its lines for the keys file on stdout: `dynamo-host key new acme >> keys.toml`.
#[expect(clippy::print_stderr, reason = "the key is for the person at the terminal, and not for the file")]
pub(super) fn new(flags: &NewKeyFlags) -> Result<(), String> {
    #[derive(Serialize)]
    struct Lines<'a> {
        key: [Line<'a>; 1],
    }
    #[derive(Serialize)]
    struct Line<'a> {
        tenant: &'a str,
        sha256: &'a str,
        #[serde(skip_serializing_if = "Option::is_none")]
        priority: Option<i32>,
        #[serde(skip_serializing_if = "Option::is_none")]
        class: Option<&'a str>,
        #[serde(skip_serializing_if = "<[String]>::is_empty")]
        models: &'a [String],
        #[serde(skip_serializing_if = "Option::is_none")]
        expires: Option<toml::value::Datetime>,
    }
    let NewKey { key, sha256 } = NewKey::random()?;
    let NewKeyFlags { tenant, priority, class, models, expires } = flags;
    let class = class.as_deref();
    let line = Line { tenant, sha256: &sha256, priority: *priority, class, models, expires: *expires };
    let lines = toml::to_string(&Lines { key: [line] }).map_err(|error| error.to_string())?;
    crate::auth::check(&lines)?;
    eprintln!("{key}");
    println!("{lines}");
    Ok(())
}
