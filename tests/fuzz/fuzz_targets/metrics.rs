//! See `dynamo_host::fuzzing::metrics`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| dynamo_host::fuzzing::metrics(data));
