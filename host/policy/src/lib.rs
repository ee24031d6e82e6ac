//! The WASM host
