//! Components to activate: what `cargo xtask policies` built, and some that no host should take.

use std::{
    fs,
    path::{Path, PathBuf},
};

/// A policy of `policies/`.
pub(crate) fn policy(name: &str) -> String {
    built("policies", name)
}

/// A guest of `tests/guests/`.
pub(crate) fn guest(name: &str) -> String {
    built("guests", name)
}

fn built(kind: &str, name: &str) -> String {
    let target = Path::new(env!("CARGO_TARGET_TMPDIR")).parent().unwrap();
    let path: PathBuf = [target, Path::new(kind), Path::new(&format!("{name}.wasm"))].iter().collect();
    assert!(path.exists(), "{} is missing; run: cargo xtask policies", path.display());
    path.to_str().unwrap().to_owned()
}

/// Files that are no routing policy, each with the cause under which it is refused and what the refusal says.
pub(crate) const REFUSED: [(&str, &str); 6] = [
    ("empty", "the file is empty"),
    ("not-wasm", "not WebAssembly"),
    ("core-module", "wasm-tools component new"),
    ("wrong-world", "`router` or `admission`"),
    ("forbidden-import", "wasi:filesystem/types@0.2.0"),
    ("malformed", "build or copy it again"),
];

/// The bytes of a file of [`REFUSED`].
pub(crate) fn refused(cause: &str) -> Vec<u8> {
    match cause {
        "empty" => Vec::new(),
        "not-wasm" => b"#!/bin/sh\necho a policy\n".to_vec(),
        "core-module" => wat::parse_str("(module)").unwrap(),
        "wrong-world" => named(r#"(instance $i) (export "dynamo:policy/autoscaling@0.1.0" (instance $i))"#),
        "forbidden-import" => named(
            r#"(import "wasi:filesystem/types@0.2.0" (instance))
            (instance $i)
            (export "dynamo:policy/routing@0.1.0" (instance $i))
            (export "dynamo:policy/lifecycle@0.1.0" (instance $i))"#,
        ),
        "malformed" => {
            let mut bytes = fs::read(policy("round-robin")).unwrap();
            bytes.truncate(bytes.len() / 2);
            bytes
        }
        other => panic!("no file is refused for {other}"),
    }
}

/// A component with this content and a name.
fn named(content: &str) -> Vec<u8> {
    wat::parse_str(format!(r#"(component (@custom "dynamo:policy" "name: x\nversion: 1.0.0\n") {content})"#)).unwrap()
}
