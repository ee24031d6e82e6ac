//! See `dynamo_host::fuzzing::worker`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| dynamo_host::fuzzing::worker(data));
