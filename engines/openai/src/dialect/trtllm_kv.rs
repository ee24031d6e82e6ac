//! TensorRT-LLM's KV events, as its serving layer hands them out: each once, to whoever asks first.
//!
//! Events are numbered per rank. Only the largest attention window keeps whole prefixes. A block that moves between memories
//! keeps the tier where it was stored, since the move does not tell its tokens: it is cached all the same.

use std::collections::BTreeMap;

use dynamo_engine_api::{EngineHash, KvEvent, KvNote, KvUpdate, StoredBlocks, Tier};
use serde::Deserialize;

/// Updates that are kept for the next reading at most; what is older then is a gap.
const MAX_UPDATES: usize = 100_000;

/// What was read and not told yet.
#[derive(Debug, Default)]
pub(super) struct KvFolded {
    ranks: BTreeMap<u32, Rank>,
    updates: Vec<KvUpdate>,
}

#[derive(Debug, Default)]
struct Rank {
    last: Option<u64>,
    window: u64,
    block_size: usize,
}

#[derive(Debug, Deserialize)]
pub(super) struct Event {
    event_id: u64,
    data: serde_json::Value,
    #[serde(default)]
    window_size: Option<u64>,
    #[serde(default)]
    attention_dp_rank: Option<u32>,
}

#[derive(Deserialize)]
#[serde(tag = "type", rename_all = "lowercase")]
enum Data {
    Created {},
    Stored { parent_hash: Option<Hash>, blocks: Vec<Block> },
    Removed { block_hashes: Vec<Hash> },
    Updated {},
}

#[derive(Deserialize)]
struct Block {
    block_hash: Hash,
    tokens: Vec<Token>,
    #[serde(default)]
    cache_level: u32,
    #[serde(default)]
    lora_id: Option<u64>,
}

#[derive(Deserialize)]
struct Token {
    token_id: u32,
    #[serde(default)]
    token_extra_id: u64,
}

/// A number, or since its second version a text of hexadecimal digits.
#[derive(Deserialize)]
#[serde(untagged)]
enum Hash {
    Number(u64),
    Text(String),
}

impl Hash {
    fn read(&self) -> Option<EngineHash> {
        match self {
            Self::Number(number) => Some(EngineHash(*number)),
            Self::Text(text) => {
                let last = text.get(text.len().saturating_sub(16)..)?;
                u64::from_str_radix(last, 16).ok().map(EngineHash)
            }
        }
    }
}

impl KvFolded {
    /// Takes what was read.
    pub(super) fn fold(&mut self, events: Vec<Event>) {
        for event in events {
            self.fold_one(event);
        }
        if self.updates.len() > MAX_UPDATES {
            self.updates.clear();
            self.updates.push(KvUpdate::Reset { rank: None, cause: "gap" });
        }
    }

    /// Hands over what was read.
    pub(super) fn take(&mut self) -> Vec<KvUpdate> {
        std::mem::take(&mut self.updates)
    }

    fn fold_one(&mut self, event: Event) {
        let number = event.attention_dp_rank.unwrap_or(0);
        let rank = self.ranks.entry(number).or_default();
        let reset = |cause| KvUpdate::Reset { rank: Some(number), cause };
        match rank.last {
            Some(last) if event.event_id <= last => {
                *rank = Rank::default();
                self.updates.push(reset("restart"));
            }
            Some(last) if event.event_id > last + 1 => self.updates.push(reset("gap")),
            _ => {}
        }
        rank.last = Some(event.event_id);
        let window = event.window_size.unwrap_or(u64::MAX);
        if window > rank.window {
            if rank.window > 0 {
                self.updates.push(reset("gap"));
            }
            rank.window = window;
        }
        let left_out = |cause| KvUpdate::Note { rank: Some(number), note: KvNote::LeftOut { cause, events: 1 } };
        if window < rank.window {
            self.updates.push(left_out("attention"));
            return;
        }
        let is_removal = event.data["type"] == "removed";
        let events = match serde_json::from_value::<Data>(event.data) {
            Ok(Data::Created {}) => return,
            Ok(Data::Updated {}) => return self.updates.push(left_out("moved")),
            Ok(Data::Removed { block_hashes }) => removed(&block_hashes),
            Ok(Data::Stored { parent_hash, blocks }) => match stored(parent_hash.as_ref(), &blocks, &mut rank.block_size) {
                Some(events) => Some(events),
                None => return self.updates.push(left_out("malformed")),
            },
            // What is gone is not known.
            Err(_) if is_removal => None,
            Err(_) => return self.updates.push(left_out("unknown_type")),
        };
        let Some(events) = events else {
            return self.updates.extend([reset("unreadable"), left_out("malformed")]);
        };
        if !events.is_empty() {
            self.updates.push(KvUpdate::Events { rank: number, model: None, events, lag: None });
        }
    }
}

/// From wherever they were stored; `None` if one cannot be read.
fn removed(hashes: &[Hash]) -> Option<Vec<KvEvent>> {
    let hashes: Vec<EngineHash> = hashes.iter().map(Hash::read).collect::<Option<_>>()?;
    Some([Tier::Device, Tier::Host].map(|tier| KvEvent::Removed { hashes: hashes.clone(), tier }).into())
}

/// Whole blocks of text, one event each, since each has a level of its own.
fn stored(parent: Option<&Hash>, blocks: &[Block], block_size: &mut usize) -> Option<Vec<KvEvent>> {
    let mut parent = match parent {
        None | Some(Hash::Number(0)) => None,
        Some(hash) => Some(hash.read()?),
    };
    *block_size = blocks.iter().map(|block| block.tokens.len()).fold(*block_size, usize::max);
    let mut events = Vec::with_capacity(blocks.len());
    for block in blocks {
        let is_plain = block.lora_id.is_none() && block.tokens.iter().all(|token| token.token_extra_id == 0);
        if block.tokens.is_empty() || block.tokens.len() < *block_size || !is_plain {
            break;
        }
        let hash = block.block_hash.read()?;
        events.push(KvEvent::Stored(StoredBlocks {
            parent,
            hashes: vec![hash],
            tokens: block.tokens.iter().map(|token| token.token_id).collect(),
            block_size: u32::try_from(*block_size).ok()?,
            tier: if block.cache_level == 0 { Tier::Device } else { Tier::Host },
            adapter: None,
            cache_salt: None,
        }));
        parent = Some(hash);
    }
    Some(events)
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn block(hash: u64, tokens: &[u32], level: u32) -> Value {
        let tokens: Vec<Value> =
            tokens.iter().map(|id| json!({ "type": "unique_token", "token_id": id, "token_extra_id": 0 })).collect();
        json!({ "type": "stored_block", "block_hash": hash, "tokens": tokens, "cache_level": level, "priority": 35 })
    }

    fn fold(folded: &mut KvFolded, events: Value) -> Vec<KvUpdate> {
        folded.fold(serde_json::from_value(events).unwrap());
        folded.take()
    }

    fn stored(id: u64, window: u64, parent: Value, blocks: Vec<Value>) -> Value {
        json!({ "event_id": id, "window_size": window, "data": { "type": "stored", "parent_hash": parent, "blocks": blocks } })
    }

    fn told(updates: &[KvUpdate]) -> Vec<&KvEvent> {
        updates
            .iter()
            .filter_map(|update| if let KvUpdate::Events { events, .. } = update { Some(events) } else { None })
            .flatten()
            .collect()
    }

    #[test]
    fn blocks_follow_each_other_and_a_partial_one_is_left_out() {
        let mut folded = KvFolded::default();
        let created =
            json!({ "event_id": 0, "window_size": 4096, "data": { "type": "created", "num_blocks_per_cache_level": [9, 9] } });
        let blocks = vec![block(7, &[1, 2], 0), block(8, &[3, 4], 1), block(9, &[5], 0)];
        let updates = fold(&mut folded, json!([created, stored(1, 4096, json!(0), blocks)]));
        let told = told(&updates);
        let [KvEvent::Stored(first), KvEvent::Stored(second)] = told[..] else { panic!("{told:?}") };
        assert_eq!((first.parent, first.tier, first.tokens.clone(), first.block_size), (None, Tier::Device, vec![1, 2], 2));
        assert_eq!((second.parent, second.tier), (Some(EngineHash(7)), Tier::Host));
        let gone = json!([{ "event_id": 2, "window_size": 4096, "data": { "type": "removed", "block_hashes": [8] } }]);
        assert_eq!(fold(&mut folded, gone).len(), 1);
    }

    #[test]
    fn a_missing_number_and_one_that_goes_back_are_resets() {
        let mut folded = KvFolded::default();
        let one = |id| json!([stored(id, 64, json!(null), vec![block(id, &[1], 0)])]);
        assert!(matches!(fold(&mut folded, one(5))[..], [KvUpdate::Events { .. }]));
        assert!(matches!(fold(&mut folded, one(7))[..], [KvUpdate::Reset { cause: "gap", .. }, KvUpdate::Events { .. }]));
        assert!(matches!(fold(&mut folded, one(0))[..], [KvUpdate::Reset { cause: "restart", .. }, KvUpdate::Events { .. }]));
    }

    #[test]
    fn a_removal_that_cannot_be_read_is_a_reset() {
        let mut folded = KvFolded::default();
        for (id, hashes) in [json!([7, "no hash"]), json!(null)].into_iter().enumerate() {
            let gone = json!([{ "event_id": id, "data": { "type": "removed", "block_hashes": hashes } }]);
            let updates = fold(&mut folded, gone);
            assert!(
                matches!(updates[..], [KvUpdate::Reset { rank: Some(0), cause: "unreadable" }, KvUpdate::Note { .. }]),
                "{updates:?}"
            );
        }
    }

    #[test]
    fn only_the_largest_window_counts_and_what_is_not_known_does_no_harm() {
        let mut folded = KvFolded::default();
        let updates = fold(
            &mut folded,
            json!([
                stored(0, 4096, json!(null), vec![block(1, &[1], 0)]),
                stored(1, 512, json!(null), vec![block(2, &[1], 0)]),
                { "event_id": 2, "window_size": 4096, "data": { "type": "updated", "block_hash": 1, "cache_level": { "type": "event_diff", "new_value": 1, "old_value": 0 } } },
                { "event_id": 3, "window_size": 4096, "data": { "type": "novel" } },
            ]),
        );
        assert_eq!(told(&updates).len(), 1);
        let causes: Vec<_> = updates
            .iter()
            .filter_map(|update| match update {
                KvUpdate::Note { note: KvNote::LeftOut { cause, .. }, .. } => Some(*cause),
                _ => None,
            })
            .collect();
        assert_eq!(causes, ["attention", "moved", "unknown_type"]);
    }
}
