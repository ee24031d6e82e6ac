//! Drives the fuzz targets with mutations of their corpus, on a stable compiler: `cargo xtask fuzz --seconds N [TARGET…]`.
//!
//! An input on which a target panics is written to `target/fuzz/TARGET-N`; it becomes a seed together with its fix.
#![allow(clippy::print_stdout)]

use std::{
    env, fs,
    panic::catch_unwind,
    path::Path,
    process::ExitCode,
    time::{Duration, Instant},
};

use dynamo_host::fuzzing::{TARGETS, Target, mutate::Mutator};

fn main() -> ExitCode {
    let mut arguments = env::args().skip(1);
    let seconds = arguments.next().and_then(|text| text.parse().ok()).unwrap_or(10);
    let wanted: Vec<String> = arguments.collect();
    if let Some(unknown) = wanted.iter().find(|name| !TARGETS.iter().any(|(target, _)| target == name)) {
        let names: Vec<&str> = TARGETS.iter().map(|(name, _)| *name).collect();
        eprintln!("error: there is no target {unknown:?}; there are {}", names.join(", "));
        return ExitCode::from(2);
    }
    let chosen = TARGETS.iter().filter(|(name, _)| wanted.is_empty() || wanted.iter().any(|wanted| wanted == name));
    let broken = chosen.filter(|(name, target)| !holds(name, *target, Duration::from_secs(seconds))).count();
    if broken == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

/// Runs one target; `false` at the first input that breaks it.
fn holds(name: &str, target: Target, time: Duration) -> bool {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap();
    let files = fs::read_dir(root.join("tests/fuzz/corpus").join(name)).unwrap();
    let mut seeds: Vec<_> = files.map(|file| file.unwrap().path()).collect();
    seeds.sort();
    let seeds: Vec<Vec<u8>> = seeds.iter().map(|seed| fs::read(seed).unwrap()).collect();
    let started = Instant::now();
    // Another stretch of inputs each time; the input itself is kept, so that none is lost by it.
    let mut mutator = Mutator::new(std::time::UNIX_EPOCH.elapsed().map_or(0, |now| now.as_nanos() as u64));
    let mut inputs = 0u64;
    while started.elapsed() < time {
        for _ in 0..1000 {
            let input = mutator.next(&seeds);
            inputs += 1;
            if catch_unwind(|| target(&input)).is_err() {
                let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).parent().unwrap().join("fuzz");
                fs::create_dir_all(&folder).unwrap();
                let file = folder.join(format!("{name}-{inputs}"));
                fs::write(&file, &input).unwrap();
                println!("{name}: BROKEN by {}", file.display());
                return false;
            }
        }
    }
    println!("{name}: {inputs} inputs in {:.0} s", started.elapsed().as_secs_f64());
    true
}
