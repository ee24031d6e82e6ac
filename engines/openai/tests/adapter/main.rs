//! The adapter against servers that behave as scripted, byte by byte where it matters, and against the mock engine.

mod cancel;
mod conformance;
mod connections;
mod control;
mod doubles;
mod kinds;
mod replies;
mod scripted;
mod streams;
mod tls;
