//! What was measured: medians over rounds, as Markdown tables and as JSON.

use std::{collections::BTreeMap, fmt, fs, time::Duration};

use anyhow::{Context, Result};
use serde_json::{Value, json};

use super::{Mode, Options, TOKENS, contenders::Contender};

/// One run of the generator.
#[derive(Clone, Copy, Default)]
pub(super) struct Point {
    /// Of the proxy, for 1,000 streams; none for `direct`.
    cpu_ms: Option<f64>,
    streams_per_s: f64,
    /// Times to the first token and between tokens, in ms.
    ttft_p50: f64,
    ttft_p99: f64,
    gap_p50: f64,
    gap_p99: f64,
    pub(super) failures: u64,
}

/// Names of a point's values, as JSON has them.
const VALUES: [&str; 6] =
    ["cpu_ms_per_1000_streams", "streams_per_s", "ttft_p50_ms", "ttft_p99_ms", "token_gap_p50_ms", "token_gap_p99_ms"];

impl Point {
    /// Reads what the generator printed.
    pub(super) fn read(result: &Value, cpu: Option<Duration>) -> Result<Self> {
        let number = |pointer: &str| {
            result.pointer(pointer).and_then(Value::as_f64).with_context(|| format!("the generator printed no {pointer}"))
        };
        let failures = result["failures"].as_u64().unwrap_or_default();
        let done = number("/requests")? - failures as f64;
        Ok(Self {
            cpu_ms: cpu.map(|cpu| cpu.as_secs_f64() * 1e6 / done),
            streams_per_s: number("/streams_per_s")?,
            ttft_p50: number("/ttft_us/p50")? / 1e3,
            ttft_p99: number("/ttft_us/p99")? / 1e3,
            gap_p50: number("/gap_us/p50")? / 1e3,
            gap_p99: number("/gap_us/p99")? / 1e3,
            failures,
        })
    }

    fn values(&self) -> [f64; 6] {
        let Self { cpu_ms, streams_per_s, ttft_p50, ttft_p99, gap_p50, gap_p99, .. } = *self;
        [cpu_ms.unwrap_or(f64::NAN), streams_per_s, ttft_p50, ttft_p99, gap_p50, gap_p99]
    }

    /// The median of each value; failures are added up.
    fn median(points: &[Self]) -> Self {
        let [cpu_ms, streams_per_s, ttft_p50, ttft_p99, gap_p50, gap_p99] =
            std::array::from_fn(|at| median(points.iter().map(|point| point.values()[at]).collect()));
        let failures = points.iter().map(|point| point.failures).sum();
        Self { cpu_ms: (!cpu_ms.is_nan()).then_some(cpu_ms), streams_per_s, ttft_p50, ttft_p99, gap_p50, gap_p99, failures }
    }

    fn json(&self) -> Value {
        let values = VALUES.iter().zip(self.values()).map(|(&name, value)| (name.to_owned(), json!(value)));
        let failures = ("failures".to_owned(), json!(self.failures));
        Value::Object(values.chain([failures]).collect())
    }
}

impl fmt::Display for Point {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(cpu) = self.cpu_ms {
            write!(f, "{cpu:.0} ms CPU per 1,000 streams, ")?;
        }
        write!(f, "{:.0} streams/s, first token {:.2} ms, {} failed", self.streams_per_s, self.ttft_p50, self.failures)
    }
}

fn median(mut samples: Vec<f64>) -> f64 {
    samples.sort_unstable_by(f64::total_cmp);
    samples.get(samples.len() / 2).copied().unwrap_or(f64::NAN)
}

/// All that was measured.
pub(super) struct Report {
    settings: Value,
    /// In the order of the tables.
    contenders: Vec<(&'static str, String)>,
    skipped: BTreeMap<&'static str, String>,
    points: BTreeMap<(Mode, u64, &'static str), Vec<Point>>,
    /// Ready after so many ms, and peak memory in MiB, of each start.
    starts: BTreeMap<&'static str, Vec<(f64, f64)>>,
}

impl Report {
    pub(super) fn new(options: &Options, contenders: &[Contender], skipped: BTreeMap<&'static str, String>) -> Self {
        let settings = json!({
            "rounds": options.rounds, "requests": options.requests, "tokens": TOKENS, "engines": options.engines,
            "pace_ms": options.pace_ms, "machine": machine(),
        });
        let contenders = contenders.iter().map(|contender| (contender.name, contender.version())).collect();
        Self { settings, contenders, skipped, points: BTreeMap::new(), starts: BTreeMap::new() }
    }

    pub(super) fn add(&mut self, name: &'static str, mode: Mode, concurrency: u64, point: Point) {
        self.points.entry((mode, concurrency, name)).or_default().push(point);
    }

    pub(super) fn started(&mut self, name: &'static str, ready_after: Duration, peak_rss: u64) {
        let start = (ready_after.as_secs_f64() * 1e3, peak_rss as f64 / f64::from(1 << 20));
        self.starts.entry(name).or_default().push(start);
    }

    /// A turn that failed. What the contender did in others still counts.
    pub(super) fn skip(&mut self, name: &'static str, error: &anyhow::Error) {
        println!("  {name} is left out of this turn: {error:#}");
        self.skipped.insert(name, format!("{error:#}"));
    }

    pub(super) fn print(&self) {
        let mut tables: Vec<(Mode, u64)> = self.points.keys().map(|&(mode, concurrency, _)| (mode, concurrency)).collect();
        tables.dedup();
        println!("\n{}\n", machine());
        self.print_overview(&tables);
        for (mode, concurrency) in tables {
            self.print_table(mode, concurrency);
        }
        for (name, reason) in &self.skipped {
            println!("\n{name} was left out: {reason}");
        }
    }

    /// Start, memory, and CPU time at every point.
    fn print_overview(&self, tables: &[(Mode, u64)]) {
        println!("Right of the memory: CPU ms per 1,000 streams at so many concurrent ones.\n");
        print!("| contender | ready after ms | peak RSS MiB |");
        for (mode, concurrency) in tables {
            print!(" {mode:?} {concurrency} |");
        }
        println!("\n|---|---:|---:|{}", "---:|".repeat(tables.len()));
        for (name, version) in &self.contenders {
            let Some((ready, rss)) = self.start_of(name) else { continue };
            print!("| {name} ({version}) | {ready:.0} | {rss:.0} |");
            for (mode, concurrency) in tables {
                let point = self.points.get(&(*mode, *concurrency, *name)).map(|points| Point::median(points));
                print!(" {:.0} |", point.and_then(|point| point.cpu_ms).unwrap_or(f64::NAN));
            }
            println!();
        }
    }

    fn print_table(&self, mode: Mode, concurrency: u64) {
        println!("\n{mode:?}, {concurrency} concurrent streams:\n");
        println!(
            "| contender | CPU ms per 1,000 streams | streams/s | first token p50 ms | p99 | token gap p50 ms | p99 | failed |"
        );
        println!("|---|---:|---:|---:|---:|---:|---:|---:|");
        let point = |name| self.points.get(&(mode, concurrency, name)).map(|points| Point::median(points));
        let direct = point("direct").unwrap_or_default();
        for &(name, _) in &self.contenders {
            let Some(point) = point(name) else { continue };
            let Some(cpu) = point.cpu_ms else {
                let Point { streams_per_s, ttft_p50, ttft_p99, gap_p50, gap_p99, failures, .. } = point;
                println!(
                    "| {name} | – | {streams_per_s:.0} | {ttft_p50:.2} | {ttft_p99:.2} | {gap_p50:.2} | {gap_p99:.2} | {failures} |"
                );
                continue;
            };
            print!("| {name} | {cpu:.0} | {:.0} |", point.streams_per_s);
            for (value, direct) in point.values().into_iter().zip(direct.values()).skip(2) {
                print!(" {:+.2} |", value - direct);
            }
            println!(" {} |", point.failures);
        }
    }

    /// Medians of ready times and memory.
    fn start_of(&self, name: &str) -> Option<(f64, f64)> {
        let starts = self.starts.get(name)?;
        Some((median(starts.iter().map(|start| start.0).collect()), median(starts.iter().map(|start| start.1).collect())))
    }

    pub(super) fn json(&self) -> Result<String> {
        let contenders: Vec<Value> = self
            .contenders
            .iter()
            .map(|(name, version)| {
                let points: Vec<Value> = self
                    .points
                    .iter()
                    .filter(|((_, _, of), _)| of == name)
                    .map(|((mode, concurrency, _), points)| {
                        let rounds: Vec<Value> = points.iter().map(Point::json).collect();
                        let mode = format!("{mode:?}").to_lowercase();
                        json!({"mode": mode, "concurrency": concurrency, "median": Point::median(points).json(), "rounds": rounds})
                    })
                    .collect();
                let (ready, rss) = self.start_of(name).unzip();
                json!({"name": name, "version": version, "ready_ms": ready, "peak_rss_mib": rss, "points": points})
            })
            .collect();
        let all = json!({"settings": self.settings, "skipped": self.skipped, "contenders": contenders});
        Ok(serde_json::to_string_pretty(&all)?)
    }
}

/// Processor, cores, kernel.
fn machine() -> String {
    let read = |path| fs::read_to_string(path).unwrap_or_default();
    let processor = read("/proc/cpuinfo");
    let processor = processor.lines().find_map(|line| line.strip_prefix("model name")).unwrap_or("an unknown processor");
    let cores = std::thread::available_parallelism().map_or(0, std::num::NonZeroUsize::get);
    let kernel = read("/proc/sys/kernel/osrelease");
    format!("{}, {cores} cores, Linux {}", processor.trim_start_matches([' ', '\t', ':']), kernel.trim())
}
