//! See `dynamo_host::fuzzing::handoff`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| dynamo_host::fuzzing::handoff(data));
