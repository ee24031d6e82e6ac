//! Many synthetic requests through the flow core, with engines that fail and clients that leave; all sums are checked after each event, and
//! all books now and then. `cargo run --release --package dynamo-host-sim --example faults -- 10000000`

#![allow(clippy::print_stdout, reason = "it prints what came of it")]

use std::{process::ExitCode, time::Instant};

use dynamo_engine_mock::Profile;
use dynamo_host_sim::{
    Contender, Faults, Options, Queueing, Report, Tenant, Trace, bounds::bounds, default_profile, report::Row, simulate,
};

const QUEUE: &str = "max_running=48,max_requests=2000,timeout_s=20,leave=0.02,leave_s=1";
const TENANTS: [&str; 4] = ["vip,share=0.05", "a,tier=1,class=gold,share=2", "b,tier=1,weight=2", "c,tier=1,weight=4,share=2"];
const FAULTS: &str = "die_every_s=20,slow_every_s=30,hang_every_s=25";
/// Events from one check of all books to the next.
const AUDIT_EVERY: u64 = 100_000;
const SEED: u64 = 1;

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            println!("{error}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> Result<(), String> {
    let requests = std::env::args().nth(1).unwrap_or_else(|| "100000".to_owned());
    let source =
        format!("synthetic:requests={requests},rate=2500,prefixes=20,prefix_tokens=64,turns=2,think_s=5,input=64,output=8");
    let trace = Trace::open(&source, SEED).map_err(|error| error.to_string())?;
    let profile = Profile { kv_blocks: 2048, max_num_seqs: 64, max_model_len: 32_768, ..default_profile() };
    let tenants = TENANTS.iter().map(|text| Tenant::parse(text)).collect::<Result<_, _>>()?;
    let options = Options {
        queueing: Some(Queueing { tenants, ..Queueing::parse(QUEUE)? }),
        faults: Some(Faults::parse(FAULTS)?),
        audit_every: Some(AUDIT_EVERY),
        seed: SEED,
        ..Options::new(vec![profile; 8])
    };
    println!("--trace {source} --queue {QUEUE} --tenant {} --faults {FAULTS}", TENANTS.join(" --tenant "));
    let begun = Instant::now();
    let native = Contender { name: "native".to_owned(), policy: None };
    let row = Row::new(simulate(&trace, &options, &native, &|_| ()).map_err(|error| error.to_string())?);
    let wall = begun.elapsed();
    let few = Trace { requests: trace.requests[..1].to_vec(), ..Trace::default() };
    let report = Report {
        trace: trace.name.clone(),
        requests: trace.requests.len() as u64,
        workers: 8,
        speed: 1.0,
        seed: SEED,
        engine: options.workers[0].profile.clone(),
        bounds: bounds(&few, &options.workers).map_err(|error| error.to_string())?,
        policies: vec![row],
    };
    // The bounds are of one request only: those of all would take longer than the run.
    report.table().lines().filter(|line| !line.starts_with("bound")).for_each(|line| println!("{line}"));
    let row = &report.policies[0];
    let tenants = row.queue.iter().flat_map(|queue| &queue.tenants);
    let ended: u64 = tenants.map(|of| of.served + of.rejected + of.shed + of.refused + of.expired + of.left + of.failed).sum();
    let events = row.tally().events;
    println!(
        "{ended} of {} requests ended; {events} events in {:.1} s, {:.0} a second; the sums agreed after each, all books after each {AUDIT_EVERY}",
        report.requests,
        wall.as_secs_f64(),
        events as f64 / wall.as_secs_f64()
    );
    if ended == report.requests { Ok(()) } else { Err("some requests did not end".to_owned()) }
}
