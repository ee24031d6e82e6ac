//! The adapter against servers that behave as scripted, byte by byte where it matters, and against the mock engine.

mod cancel;
mod conformance;
mod connections;
mod control;
mod doubles;
mod kinds;
mod pairs;
mod replies;
mod scripted;
#[path = "../../../../tests/e2e/doubles/mod.rs"]
#[allow(dead_code, unused_imports, reason = "the end-to-end suite uses the rest")]
mod split;
mod streams;
mod tls;
