//! `cargo xtask bench tokenize`: what tokens of prompts cost, with the cache and without.

use std::path::PathBuf;

use anyhow::{Context, Result};
use clap::Args;
use serde_json::Value;

use crate::{paths, run};

#[derive(Args)]
pub(crate) struct Options {
    /// Directory of a model's tokenizer [default: the small one of host/tokens]
    #[arg(long, value_name = "DIR")]
    tokenizer: Option<PathBuf>,
    /// Rounds, of which the median counts
    #[arg(long, default_value_t = 5)]
    rounds: usize,
}

pub(crate) fn run(options: &Options) -> Result<()> {
    let small = || paths::root().join("host/tokens/tests/fixtures/small");
    let directory = options.tokenizer.clone().unwrap_or_else(small);
    let directory = directory.canonicalize().with_context(|| format!("{} is no directory", directory.display()))?;
    let mut bench = run::cargo();
    bench.args(["run", "--quiet", "--release", "--package", "dynamo-host-tokens", "--example", "tokenize", "--"]);
    let measured: Value = serde_json::from_str(&run::read(bench.arg(&directory).arg(options.rounds.to_string()))?)?;
    let (document, chat) = (&measured["document"], &measured["chat"]);
    println!("Milliseconds on one core, from a request's body to its ids, median of {} rounds:\n", options.rounds);
    println!("| prompt | tokens | without cache | with cache |");
    println!("|---|---:|---:|---:|");
    let ms = |value: &Value| format!("{:.2}", value.as_f64().unwrap_or(f64::NAN));
    let row = |name: &str, tokens: &Value, without: &Value, with: &Value| {
        println!("| {name} | {tokens} | {} | {} |", ms(without), ms(with));
    };
    row("a document, for the first time", &document["tokens"], &document["uncached_ms"], &document["first_ms"]);
    row("the same again", &document["tokens"], &document["uncached_ms"], &document["again_ms"]);
    row("the same document, another question", &document["tokens"], &document["uncached_ms"], &document["next_question_ms"]);
    row("all ten turns of a chat, each a request", &chat["tokens"], &chat["all_turns_uncached_ms"], &chat["all_turns_cached_ms"]);
    println!("\nThe chat's last turn alone takes {} ms with the cache.", ms(&chat["last_turn_cached_ms"]));
    Ok(())
}
