//! See `dynamo_host::fuzzing::http_answer`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| dynamo_host::fuzzing::http_answer(data));
