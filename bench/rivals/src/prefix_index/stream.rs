//! Lookups and events, from a trace.
//!
//! A trace in Mooncake's format says of each request the chained ids of its blocks of 512 tokens. Each becomes blocks of the
//! size asked for. A request goes to a worker at random (seeded), and its prompt's whole blocks into that worker's cache:
//! blocks that are not there are stored, in one event as by a prefill; then those of the output, one by one. What does
//! not fit is evicted, least recently used first, leaf first, and removed in one event.

use std::{
    collections::{BTreeSet, HashMap},
    path::PathBuf,
};

use serde::Deserialize;

/// Tokens of a block of the trace.
const TRACE_BLOCK: u32 = 512;

pub(crate) struct Stream {
    pub(crate) steps: Vec<Step>,
    pub(crate) stored: u64,
    pub(crate) removed: u64,
    /// Blocks held at the end, summed over workers.
    pub(crate) resident: u64,
}

pub(crate) struct Step {
    /// The prompt's blocks, by content.
    pub(crate) blocks: Vec<u64>,
    pub(crate) events: Vec<(usize, Event)>,
}

pub(crate) enum Event {
    /// Blocks: the engine's hash and content of each.
    Stored {
        parent: Option<u64>,
        blocks: Vec<(u64, u64)>,
    },
    Removed(Vec<u64>),
}

#[derive(Deserialize)]
struct Request {
    input_length: u32,
    output_length: u32,
    hash_ids: Vec<u64>,
}

impl Stream {
    pub(crate) fn of(trace: &Option<PathBuf>, requests: usize, block: u32, workers: usize, capacity: usize) -> Self {
        let requests: Vec<Request> = match trace {
            Some(path) => std::fs::read_to_string(path)
                .unwrap_or_else(|error| panic!("cannot read trace {}: {error}", path.display()))
                .lines()
                .take(requests)
                .enumerate()
                .map(|(line, text)| {
                    serde_json::from_str(text).unwrap_or_else(|error| panic!("trace, line {}: {error}", line + 1))
                })
                .collect(),
            None => conversations(requests.min(12_000)),
        };
        let mut caches: Vec<Cache> = (0..workers).map(|_| Cache::default()).collect();
        let mut stream = Self { steps: Vec::with_capacity(requests.len()), stored: 0, removed: 0, resident: 0 };
        for (nth, request) in requests.iter().enumerate() {
            let worker = (mix(nth as u64 ^ 0x5eed) % workers as u64) as usize;
            let events = caches[worker].serve(nth, request, block, capacity);
            for event in &events {
                match event {
                    Event::Stored { blocks, .. } => stream.stored += blocks.len() as u64,
                    Event::Removed(hashes) => stream.removed += hashes.len() as u64,
                }
            }
            let events = events.into_iter().map(|event| (worker, event)).collect();
            stream.steps.push(Step { blocks: prompt(request, block), events });
        }
        stream.resident = caches.iter().map(|cache| cache.used.len() as u64).sum();
        stream
    }

    pub(crate) fn lookup_blocks(&self) -> u64 {
        self.steps.iter().map(|step| step.blocks.len() as u64).sum()
    }

    pub(crate) fn events(&self) -> u64 {
        self.steps.iter().map(|step| step.events.len() as u64).sum()
    }
}

/// A worker's cache: when each block was last used, and how deep in its prompt it lies.
#[derive(Default)]
struct Cache {
    used: HashMap<u64, (u64, i64)>,
    oldest: BTreeSet<(u64, i64, u64)>,
}

impl Cache {
    fn serve(&mut self, nth: usize, request: &Request, block: u32, capacity: usize) -> Vec<Event> {
        let now = nth as u64;
        let mut events = Vec::new();
        let mut parent = None;
        let mut missing: Option<(Option<u64>, Vec<(u64, u64)>)> = None;
        let prompt = prompt(request, block);
        for (depth, &content) in prompt.iter().enumerate() {
            let engine = mix(parent.unwrap_or(7) ^ mix(content));
            if self.touch(engine, now, depth) {
                missing.get_or_insert_with(|| (parent, Vec::new())).1.push((engine, content));
            }
            parent = Some(engine);
        }
        if let Some((parent, blocks)) = missing {
            events.push(Event::Stored { parent, blocks });
        }
        for nth_output in 0..request.output_length / block {
            let content = mix(!(now << 16 | u64::from(nth_output)));
            let engine = mix(parent.unwrap_or(7) ^ mix(content));
            self.touch(engine, now, prompt.len() + nth_output as usize);
            events.push(Event::Stored { parent, blocks: vec![(engine, content)] });
            parent = Some(engine);
        }
        let mut evicted = Vec::new();
        while self.used.len() > capacity {
            let (_, _, engine) = self.oldest.pop_first().expect("as many as are used");
            self.used.remove(&engine);
            evicted.push(engine);
        }
        if !evicted.is_empty() {
            events.push(Event::Removed(evicted));
        }
        events
    }

    /// Marks a block as used now; whether it is new.
    fn touch(&mut self, engine: u64, now: u64, depth: usize) -> bool {
        let depth = -(depth as i64);
        let before = self.used.insert(engine, (now, depth));
        if let Some((then, depth)) = before {
            self.oldest.remove(&(then, depth, engine));
        }
        self.oldest.insert((now, depth, engine));
        before.is_none()
    }
}

/// The contents of a prompt's whole blocks.
fn prompt(request: &Request, block: u32) -> Vec<u64> {
    let each = u64::from(TRACE_BLOCK / block);
    let whole = (request.input_length / block) as usize;
    request.hash_ids.iter().flat_map(|&id| (0..each).map(move |part| mix(id << 8 | part))).take(whole).collect()
}

/// Token ids of blocks.
pub(crate) fn tokens(blocks: &[u64], block_size: u32) -> Vec<u32> {
    let of = |content: u64| (0..u64::from(block_size)).map(move |nth| (mix(content.wrapping_add(nth)) % 151_643) as u32);
    blocks.iter().flat_map(|&content| of(content)).collect()
}

/// Conversations of several turns under a few system prompts, in the trace's own terms.
fn conversations(requests: usize) -> Vec<Request> {
    let mut fresh = 0_u64..;
    let mut id = move || fresh.next().expect("ids do not end");
    let systems: Vec<Vec<u64>> = (0..4).map(|nth| (0..=nth).map(|_| id()).collect()).collect();
    let mut open: Vec<Vec<u64>> = Vec::new();
    (0..requests as u64)
        .map(|nth| {
            let dice = mix(nth);
            let goes_on = !open.is_empty() && dice % 100 < 60;
            let mut ids = match goes_on {
                true => open.swap_remove((dice >> 8) as usize % open.len()),
                false => systems[(dice >> 8) as usize % systems.len()].clone(),
            };
            // Most prompts are short, and a few very long.
            let new = 1 + (dice >> 16) % 12 + if (dice >> 32) % 20 == 0 { 100 } else { 0 };
            ids.extend((0..new).map(|_| id()));
            open.push(ids.clone());
            let length = ids.len() as u32 * TRACE_BLOCK - ((dice >> 40) % u64::from(TRACE_BLOCK)) as u32;
            Request { input_length: length, output_length: 50 + ((dice >> 48) % 600) as u32, hash_ids: ids }
        })
        .collect()
}

/// SplitMix64: spreads a number over 64 bits.
fn mix(number: u64) -> u64 {
    let mut z = number.wrapping_add(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}
