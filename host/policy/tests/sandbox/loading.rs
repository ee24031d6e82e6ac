//! What is refused before it can decide anything, and how the rest is compiled.

use std::{
    fs::{self, File},
    sync::Arc,
};

use dynamo_host_policy::{Limits, LoadError, Now, PolicyRuntime, read_component};

use crate::{RUNTIME, component, load, raw, runtime};

#[track_caller]
fn refused(bytes: &[u8], settings: &str, cause: &str, says: &[&str]) {
    let error = load(bytes, settings).expect_err("it should be refused");
    assert_eq!(error.cause(), cause, "{error}");
    let text = error.to_string();
    for part in says {
        assert!(text.contains(part), "{text:?} should say {part:?}");
    }
}

#[test]
fn what_is_not_a_policy_is_refused_with_the_way_out() {
    let good = component("policies", "round-robin");
    refused(b"", "{}", "empty", &["build the policy again"]);
    refused(b"#!/bin/sh\n", "{}", "not-wasm", &["not WebAssembly"]);
    refused(&wat::parse_str("(module)").unwrap(), "{}", "core-module", &["wasm-tools component new"]);
    refused(&good[..good.len() / 2], "{}", "malformed", &["build or copy it again"]);
    let mut flipped = good.clone();
    let middle = flipped.len() / 2;
    flipped[middle..middle + 64].fill(0xff);
    assert!(load(&flipped, "{}").is_err());
    refused(&vec![0; 17 << 20], "{}", "too-large", &["16777216"]);
}

/// A component of that text, with the section that names it.
fn named(text: &str) -> Vec<u8> {
    let section = r#"(@custom "dynamo:policy" "name: x\nversion: 1.0.0\n")"#;
    wat::parse_str(text.replacen("(component", &format!("(component {section}"), 1)).unwrap()
}

#[test]
fn the_wrong_world_is_refused_at_load() {
    refused(&wat::parse_str("(component)").unwrap(), "{}", "description", &["dynamo:policy", "register!"]);
    refused(&named("(component)"), "{}", "wrong-world", &["exports: nothing"]);
    let exporting = |name: &str| named(&format!(r#"(component (instance $i) (export "{name}" (instance $i)))"#));
    refused(&exporting("dynamo:policy/autoscaling@0.1.0"), "{}", "wrong-world", &["`router` or `admission`", "autoscaling"]);
    refused(&exporting("dynamo:policy/admitting@0.1.2"), "{}", "missing-export", &["lifecycle", "the world `admission`"]);
    refused(&exporting("dynamo:policy/routing@7.0.0"), "{}", "contract-version", &["7.0.0", "rebuild it"]);
    refused(&exporting("dynamo:policy/routing@0.1.0"), "{}", "missing-export", &["lifecycle"]);
}

#[test]
fn an_import_from_outside_of_the_contract_is_refused_at_load() {
    let text = r#"(component
        (import "wasi:filesystem/types@0.2.0" (instance))
        (instance $i)
        (export "dynamo:policy/routing@0.1.0" (instance $i))
        (export "dynamo:policy/lifecycle@0.1.0" (instance $i)))"#;
    refused(&named(text), "{}", "forbidden-import", &["wasi:filesystem/types@0.2.0", "allowed: dynamo:policy/", "without WASI"]);
}

#[test]
fn settings_are_checked_before_a_policy_is_active() {
    let bytes = component("policies", "least-loaded");
    refused(&bytes, "{", "settings-syntax", &["JSON object"]);
    refused(&bytes, "[]", "settings-syntax", &["JSON object"]);
    refused(&bytes, r#"{"prefil_token": 1}"#, "settings", &["prefil_token", "prefill_token"]);
    refused(
        &bytes,
        r#"{"request": -1}"#,
        "settings",
        &["request is -1", "it accepts decode_token (number), prefill_token (number)"],
    );
    refused(
        &component("guests", "hostile"),
        r#"{"mode":"trap-in-configure"}"#,
        "start",
        &["trap", "configured to panic in configure"],
    );
    refused(&component("guests", "hostile"), r#"{"mode":"trap-always"}"#, "probe", &["1 candidates", "configured to panic"]);
}

#[test]
fn the_compilation_cache_is_for_this_user_alone() {
    let directory = tempfile::tempdir().unwrap();
    let cache = directory.path().join("cache");
    let runtime = PolicyRuntime::new(Limits::default(), Arc::new(Now::default), Some(&cache)).unwrap();
    runtime.load(&component("policies", "round-robin"), "{}", Arc::default()).unwrap();
    let mode = std::os::unix::fs::PermissionsExt::mode(&fs::metadata(&cache).unwrap().permissions());
    assert_eq!(mode & 0o777, 0o700);
}

/// A component of 200 MB that is one by its beginning.
const HUGE: usize = 200 << 20;

#[test]
fn a_component_of_200_mb_is_refused_with_its_size_and_not_read() {
    let mut bytes = component("policies", "round-robin");
    bytes.resize(HUGE, 0);
    refused(&bytes, "{}", "too-large", &["209715200 bytes", "16777216", "strip it"]);

    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("huge.wasm");
    File::create(&path).unwrap().set_len(HUGE as u64).unwrap();
    let max_bytes = RUNTIME.limits().component_bytes;
    assert!(matches!(read_component(&path, max_bytes), Err(LoadError::TooLarge { bytes, .. }) if bytes == HUGE));
    let endless = read_component("/dev/zero".as_ref(), 1000).unwrap_err();
    assert!(matches!(endless, LoadError::TooLarge { bytes: 1001, .. }), "{endless}");
    let absent = read_component(&directory.path().join("none"), 1000).unwrap_err();
    assert!(absent.to_string().contains("cannot be read"), "{absent}");
    fs::write(&path, b"12").unwrap();
    assert_eq!(read_component(&path, 2).unwrap(), b"12");
}

#[test]
fn a_start_that_takes_too_long_is_refused_and_a_slow_one_is_not() {
    let bytes = component("guests", "hostile");
    refused(&bytes, r#"{"mode":"loop-in-configure"}"#, "start", &["fuel", "endless loop"]);
    load(&bytes, r#"{"mode":"slow-configure"}"#).unwrap();
}

#[test]
fn a_schema_that_cannot_be_had_is_a_fault_and_no_reason_to_refuse_the_policy() {
    for (schema, cause) in [("unreachable", "trap"), ("(loop $l (br $l))", "fuel")] {
        let version = load(&raw::component(&raw::Guest { schema, ..raw::Guest::default() }), "{}").unwrap();
        assert_eq!(version.settings_schema().unwrap_err().cause.as_str(), cause);
        // With settings that it refuses, the refusal is what is told.
        let refusing = raw::Guest { schema, configure: raw::REFUSES, ..raw::Guest::default() };
        refused(&raw::component(&refusing), "{}", "settings", &["it accepts no settings"]);
    }
}

#[test]
fn what_fails_at_any_step_of_its_start_is_refused_at_that_step() {
    let guest = raw::Guest::default;
    let cases = [
        (raw::Guest { configure: "unreachable", ..guest() }, "start", "trap"),
        (raw::Guest { configure: "(loop $l (br $l))", ..guest() }, "start", "fuel"),
        (raw::Guest { route: "unreachable", ..guest() }, "probe", "trap"),
        (raw::Guest { route: "", ..guest() }, "probe", "no-answer"),
        (raw::Guest { memory_pages: 1000, ..guest() }, "compile", "memory"),
    ];
    for (guest, cause, says) in cases {
        refused(&raw::component(&guest), "{}", cause, &[says]);
    }
    // Their instances, and what they took, are free again.
    let alone = runtime(Limits::default());
    assert!(alone.load(&raw::component(&raw::Guest { route: "unreachable", ..guest() }), "{}", Arc::default()).is_err());
    assert_eq!(alone.instance_count(), 0);
}
