//! What tokens of prompts cost, with the cache of runs and without: `cargo xtask bench tokenize` runs it and shows its JSON.
#![allow(clippy::print_stdout)]

use std::{
    env,
    path::{Path, PathBuf},
    time::Instant,
};

use dynamo_host_core::Endpoint;
use dynamo_host_tokens::{Asked, RunCache, Tokenizer};
use serde_json::{Value, json};

const TOKENS: usize = 100_000;
const TURNS: usize = 10;

fn main() {
    let mut arguments = env::args_os().skip(1);
    let directory = PathBuf::from(arguments.next().expect("the directory of a tokenizer"));
    let rounds = arguments.next().and_then(|rounds| rounds.to_str()?.parse().ok()).unwrap_or(5);
    let plain = Tokenizer::load(&directory, RunCache::new(0)).unwrap_or_else(|error| panic!("{error}"));
    let document = document(&plain);
    let chat = conversation();
    let tokens = tokens(&plain, &document_asking(&document, 0));
    let samples: Vec<[f64; 7]> = (0..rounds).map(|_| round(&directory, &plain, &document, &chat)).collect();
    let median = |at: usize| {
        let mut of: Vec<f64> = samples.iter().map(|sample| sample[at]).collect();
        of.sort_unstable_by(f64::total_cmp);
        of[of.len() / 2]
    };
    println!(
        "{:#}",
        json!({
            "document": { "tokens": tokens, "bytes": document.len(), "uncached_ms": median(0), "first_ms": median(1),
                "again_ms": median(2), "next_question_ms": median(3) },
            "chat": { "turns": TURNS, "tokens": self::tokens(&plain, &turn(&chat, TURNS)), "all_turns_uncached_ms": median(4),
                "all_turns_cached_ms": median(5), "last_turn_cached_ms": median(6) },
        })
    );
}

/// Milliseconds of each thing that is measured.
fn round(directory: &Path, plain: &Tokenizer, document: &str, chat: &[Value]) -> [f64; 7] {
    let load = || Tokenizer::load(directory, RunCache::new(RunCache::DEFAULT_BYTES)).unwrap_or_else(|error| panic!("{error}"));
    let (cached, chatting) = (load(), load());
    let first = document_asking(document, 0);
    let turns: Vec<String> = (1..=TURNS).map(|turns| turn(chat, turns)).collect();
    let all = |tokenizer: &Tokenizer| turns.iter().map(|turn| ms(tokenizer, turn)).collect::<Vec<f64>>();
    let uncached = all(plain).iter().sum();
    let with = all(&chatting);
    [
        ms(plain, &first),
        ms(&cached, &first),
        ms(&cached, &first),
        ms(&cached, &document_asking(document, 1)),
        uncached,
        with.iter().sum(),
        with[TURNS - 1],
    ]
}

/// From the body to the ids, as a request has it.
fn ms(tokenizer: &Tokenizer, body: &str) -> f64 {
    let begun = Instant::now();
    std::hint::black_box(tokens(tokenizer, body));
    begun.elapsed().as_secs_f64() * 1e3
}

fn tokens(tokenizer: &Tokenizer, body: &str) -> usize {
    let asked = Asked::of(Endpoint::ChatCompletions, body.as_bytes());
    let begun = tokenizer.begin(&asked).unwrap_or_else(|error| panic!("{error}"));
    tokenizer.finish(begun).unwrap_or_else(|error| panic!("{error}")).ids.len()
}

/// Prose, code and numbers of about so many tokens, no line twice.
fn document(tokenizer: &Tokenizer) -> String {
    let source = include_str!("../src/template.rs");
    let prose = include_str!("../../../docs/configuration.md");
    let lines: Vec<&str> = prose.lines().chain(source.lines()).collect();
    let of_lines = |count: usize| {
        let line = |number: usize| format!("{} ({number})\n", lines[number * 7 % lines.len()]);
        (0..count).map(line).collect::<String>()
    };
    let sample = tokens(tokenizer, &document_asking(&of_lines(1000), 0));
    of_lines(TOKENS * 1000 / sample)
}

fn document_asking(document: &str, number: usize) -> String {
    let content = format!("{document}\n\nQuestion {number}: what does line {number} say?");
    json!({ "messages": [{ "role": "user", "content": content }] }).to_string()
}

fn conversation() -> Vec<Value> {
    let source = include_str!("../src/prompt/chat.rs");
    let prose = include_str!("../../../docs/configuration.md");
    let part = |text: &str, number: usize, size: usize| text.chars().skip(number * size).take(size).collect::<String>();
    let said = |number: usize| {
        let user = json!({ "role": "user", "content": format!("{number}: {}", part(prose, number, 600)) });
        [user, json!({ "role": "assistant", "content": format!("{number}: {}", part(source, number, 1200)) })]
    };
    (0..TURNS).flat_map(said).collect()
}

/// The request of a conversation's turn, from 1.
fn turn(chat: &[Value], turns: usize) -> String {
    json!({ "messages": &chat[..turns * 2 - 1] }).to_string()
}
