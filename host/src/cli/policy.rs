//! `dynamo-host policy new`, `build`, `inspect`, `check` and `bench`: policies without a running host.
#![allow(clippy::print_stdout)]

mod build;
mod check;
mod new;
mod probes;
mod replay;
mod schema;
mod uses;

use std::{path::Path, sync::Arc};

use dynamo_host_policy::{
    Inspection, Limits, LoadError, Now, PolicyRuntime, PolicyVersion, SlotState, bench, inspect as inspect_bytes, read_component,
};
use serde_json::{Value, json};

use self::check::{Level, Memory, Report};
pub(super) use self::{
    new::World,
    replay::{ReplayFlags, replay},
};
use super::Output;
use crate::{config::read_settings, text::plain};

/// Writes the crate of a new policy.
pub(super) fn create(name: &str, world: World, directory: Option<&Path>, sdk: Option<&Path>) -> Result<(), String> {
    let directory = directory.unwrap_or(Path::new(name));
    new::write(name, world, directory, sdk)?;
    println!("{}: a policy that can be changed. Next:\n", directory.display());
    println!("  cd {}", directory.display());
    println!("  cargo test                                    # natively");
    println!("  dynamo-host policy build                      # {name}.wasm, checked");
    println!("  dynamo-host policy activate {} {name}.wasm", world.slot());
    Ok(())
}

/// Builds a crate's component and checks it.
pub(super) fn build(directory: &Path, out: Option<&Path>, more: &[String], output: Output) -> Result<(), String> {
    let component = build::build(directory, out, more)?;
    check(&component, None, output)
}

/// Says what a component is, without running it.
pub(super) fn inspect(file: &Path, output: Output) -> Result<(), String> {
    let bytes = read(file)?;
    let inspection = inspect_bytes(&bytes, Limits::default().component_bytes).map_err(|error| named(file, &error))?;
    let uses = uses::of(&bytes).map_err(|error| format!("{}: {error}", file.display()))?;
    if output == Output::Json {
        let contract = contract(&inspection);
        println!("{:#}", json!({ "file": file.display().to_string(), "policy": inspection, "contract": contract, "uses": uses }));
        return Ok(());
    }
    println!("{}", file.display());
    print_identity(&inspection, &uses);
    println!("  settings              policy check tells them: a policy says so itself, when it is run");
    Ok(())
}

/// Loads a component as a host would, probes it, and says what was found.
pub(super) fn check(file: &Path, settings: Option<&str>, output: Output) -> Result<(), String> {
    let bytes = read(file)?;
    let settings = read_given(settings)?;
    let version = match load(&bytes, &settings) {
        Ok(version) => version,
        Err(error) => {
            if output == Output::Json {
                let finding = json!({ "level": Level::Error, "code": error.cause(), "message": plain(&error.to_string()) });
                println!("{:#}", json!({ "file": file.display().to_string(), "ok": false, "findings": [finding] }));
            }
            return Err(named(file, &error) + &accepted(&bytes, &error));
        }
    };
    let report = check::report(file.display().to_string(), &bytes, &version, Limits::default().decision_fuel);
    if output == Output::Json {
        println!("{:#}", serde_json::to_value(&report).unwrap_or_default());
    } else {
        print_report(&report);
    }
    let errors = report.findings.iter().filter(|finding| finding.level == Level::Error).count();
    if report.ok { Ok(()) } else { Err(format!("{} has {errors} error(s), see above", file.display())) }
}

/// Measures a component's decisions. The median of rounds counts.
pub(super) fn bench(file: &Path, settings: Option<&str>, sizes: &[u32], rounds: u32, output: Output) -> Result<(), String> {
    let version = load(&read(file)?, &read_given(settings)?).map_err(|error| named(file, &error))?;
    let limit = Limits::default().decision_fuel;
    let mut rows = Vec::new();
    let world = version.world();
    for &size in sizes {
        let (mut policy, mut native) = (Vec::new(), Vec::new());
        for _ in 0..rounds {
            policy.push(bench::policy(&version, size).map_err(|fault| {
                format!("it failed with {size} {}: {}; --candidates chooses others", world.rows, plain(&fault.to_string()))
            })?);
            native.push(bench::native_fallback(world, size));
        }
        rows.push((median(policy), median(native)));
    }
    if output == Output::Json {
        let told = |cost: &bench::Cost| json!({ world.rows: cost.rows, "median_ns": cost.median_ns, "p99_ns": cost.p99_ns, "fuel": cost.fuel });
        let results: Vec<_> =
            rows.iter().map(|(policy, native)| json!({ "policy": told(policy), "native": told(native) })).collect();
        let (policy, digest) = (version.label().to_string(), version.digest().to_string());
        println!(
            "{:#}",
            json!({ "policy": policy, "digest": digest, "rounds": rounds, "fuel_limit": limit, "results": results })
        );
        return Ok(());
    }
    println!("{} beside the native fallback, per decision, columns built:", version.label());
    println!(
        "{:>12} {:>14} {:>12} {:>10} {:>8} {:>16} {:>12}",
        world.rows, "policy median", "p99", "fuel", "of it", "native median", "p99"
    );
    for (policy, native) in rows {
        println!(
            "{:>12} {:>11.2} µs {:>9.2} µs {:>10} {:>6.1} % {:>13.2} µs {:>9.2} µs",
            policy.rows,
            policy.median_ns / 1e3,
            policy.p99_ns / 1e3,
            policy.fuel,
            100.0 * policy.fuel as f64 / limit as f64,
            native.median_ns / 1e3,
            native.p99_ns / 1e3
        );
    }
    Ok(())
}

/// The round with the median of the medians.
fn median(mut rounds: Vec<bench::Cost>) -> bench::Cost {
    rounds.sort_unstable_by(|a, b| a.median_ns.total_cmp(&b.median_ns));
    rounds.swap_remove(rounds.len() / 2)
}

/// Parts `FILE.wasm[,JSON|,@FILE]`. A file's name may hold a comma; settings begin with { or @.
pub(super) fn file_and_settings(text: &str) -> (&str, Option<&str>) {
    let cut = [",{", ",@"].iter().filter_map(|mark| text.find(mark)).min();
    cut.map_or((text, None), |at| (&text[..at], Some(&text[at + 1..])))
}

fn read(file: &Path) -> Result<Vec<u8>, String> {
    read_component(file, Limits::default().component_bytes).map_err(|error| format!("{}: {error}", file.display()))
}

fn read_given(settings: Option<&str>) -> Result<String, String> {
    settings
        .map_or_else(|| Ok("{}".to_owned()), |settings| read_settings("--settings", settings).map_err(|error| error.to_string()))
}

/// Loads a policy of any world.
fn load(bytes: &[u8], settings: &str) -> Result<Arc<PolicyVersion>, LoadError> {
    load_for(bytes, settings, SlotState::default())
}

fn load_for(bytes: &[u8], settings: &str, state: SlotState) -> Result<Arc<PolicyVersion>, LoadError> {
    let runtime = PolicyRuntime::new(Limits::default(), Arc::new(Now::default), None)
        .map_err(|error| LoadError::Compile { policy: "?".to_owned(), reason: error.to_string() })?;
    runtime.load(bytes, settings, Arc::new(state))
}

fn named(file: &Path, error: &LoadError) -> String {
    format!("{}: {}", file.display(), plain(&error.to_string()))
}

/// Where settings were refused, all that there are, each on a line of its own. Told by the policy as it is without any.
fn accepted(bytes: &[u8], error: &LoadError) -> String {
    let LoadError::Settings { .. } = error else { return String::new() };
    let schema = load(bytes, "{}").ok().and_then(|version| version.settings_schema().ok());
    let schema: Value = schema.and_then(|schema| serde_json::from_str(&schema).ok()).unwrap_or_default();
    let lines = schema::lines(&schema);
    if lines.is_empty() { String::new() } else { format!("\nits settings:\n  {}", lines.join("\n  ")) }
}

/// The version of the contract that a component was built for.
fn contract(inspection: &Inspection) -> Option<String> {
    let export = inspection.exports.iter().find_map(|export| export.strip_prefix("dynamo:policy/"))?;
    Some(format!("dynamo:policy@{}", export.split_once('@')?.1))
}

fn print_identity(inspection: &Inspection, uses: &uses::Uses) {
    let author = Some(&inspection.name.author).filter(|author| !author.is_empty());
    println!("  name                  {}{}", inspection.name, author.map(|author| format!(" by {author}")).unwrap_or_default());
    println!("  digest                {}", inspection.digest);
    println!("  size                  {} kB", inspection.bytes.div_ceil(1000));
    println!("  world                 {} of {}", inspection.world, contract(inspection).unwrap_or_default());
    for (meaning, functions) in uses::lines(uses) {
        println!("  {meaning:<21} {functions}");
    }
}

fn print_report(report: &Report) {
    let verdict = if report.ok { "a policy that can be activated" } else { "NOT a policy to activate" };
    println!("{}: {verdict}", report.file);
    print_identity(&report.policy, &report.uses);
    let settings = schema::lines(&report.settings_schema);
    if settings.is_empty() {
        println!("  settings              none");
    }
    for (at, line) in settings.iter().enumerate() {
        println!("  {:<21} {line}", if at == 0 { "settings" } else { "" });
    }
    for decided in &report.decisions {
        println!(
            "  {:<21} {:>6} {}: {:<22} fuel {:>8}, {:>5.2} % of its bound",
            decided.probe,
            decided.rows.count,
            decided.rows.of,
            decided.answer,
            decided.fuel,
            100.0 * decided.fuel as f64 / report.fuel_limit as f64
        );
    }
    match report.tells_roles_apart {
        Some(true) => println!("  roles                 told apart: it is shown all, and says who prefills and who decodes"),
        Some(false) => {
            println!("  roles                 not told apart: it is asked where to begin, then who decodes what was prefilled");
        }
        None => {}
    }
    println!("  same question twice   {}", if report.deterministic { "same answer" } else { "another answer" });
    let memory = match report.memory {
        Memory::None => "nothing else",
        Memory::State => "what it keeps in state",
        Memory::Own => "what is left in its own memory",
    };
    println!("  depends besides on    {memory}");
    for finding in &report.findings {
        let level = if finding.level == Level::Error { "error" } else { "warning" };
        println!("{level} [{}]: {}", finding.code, finding.message);
    }
}
