//! See `dynamo_host::fuzzing::component`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| dynamo_host::fuzzing::component(data));
