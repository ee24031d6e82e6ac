//! See `dynamo_host::fuzzing::config`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| dynamo_host::fuzzing::config(data));
