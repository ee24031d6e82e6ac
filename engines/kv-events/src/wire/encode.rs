//! Writing a batch, as vLLM does: for the mock engine.

use dynamo_engine_api::{KvEvent, StoredBlocks, Tier};
use rmpv::Value;

use crate::publish::Form;

/// Writes a batch of one rank.
#[must_use]
pub fn encode(timestamp: f64, events: &[KvEvent], rank: u32, form: Form) -> Vec<u8> {
    let events = events.iter().map(|event| shaped(event, form)).collect();
    let batch = Value::Array(vec![timestamp.into(), Value::Array(events), rank.into()]);
    let mut bytes = Vec::new();
    rmpv::encode::write_value(&mut bytes, &batch).expect("a vector takes all that is written");
    bytes
}

fn shaped(event: &KvEvent, form: Form) -> Value {
    let (kind, fields) = match event {
        KvEvent::Stored(stored) => ("BlockStored", stored_fields(stored)),
        KvEvent::Removed { hashes, tier } => {
            let hashes = hashes.iter().map(|hash| hash.0.into()).collect();
            ("BlockRemoved", vec![("block_hashes", Value::Array(hashes)), ("medium", medium(*tier)), ("group_idx", 0.into())])
        }
        KvEvent::Cleared => ("AllBlocksCleared", Vec::new()),
    };
    match form {
        Form::Map => {
            let tagged = std::iter::once(("type", kind.into())).chain(fields);
            Value::Map(tagged.map(|(name, value)| (name.into(), value)).collect())
        }
        Form::Positional => {
            Value::Array(std::iter::once(kind.into()).chain(fields.into_iter().map(|(_, value)| value)).collect())
        }
    }
}

fn stored_fields(stored: &StoredBlocks) -> Vec<(&'static str, Value)> {
    let text = |text: &Option<std::sync::Arc<str>>| text.as_deref().map_or(Value::Nil, Value::from);
    let keys = (0..stored.hashes.len()).map(|block| {
        let salt = stored.cache_salt.iter().filter(|_| block == 0 && stored.parent.is_none());
        let keys: Vec<Value> = stored.adapter.iter().chain(salt).map(|key| Value::from(&**key)).collect();
        if keys.is_empty() { Value::Nil } else { Value::Array(keys) }
    });
    vec![
        ("block_hashes", Value::Array(stored.hashes.iter().map(|hash| hash.0.into()).collect())),
        ("parent_block_hash", stored.parent.map_or(Value::Nil, |parent| parent.0.into())),
        ("token_ids", Value::Array(stored.tokens.iter().map(|&token| token.into()).collect())),
        ("block_size", stored.block_size.into()),
        ("lora_id", if stored.adapter.is_some() { 1.into() } else { Value::Nil }),
        ("medium", medium(stored.tier)),
        ("lora_name", text(&stored.adapter)),
        ("extra_keys", Value::Array(keys.collect())),
        ("group_idx", 0.into()),
        ("kv_cache_spec_kind", "full_attention".into()),
    ]
}

fn medium(tier: Tier) -> Value {
    match tier {
        Tier::Device => "GPU",
        Tier::Host => "CPU",
        Tier::Disk => "STORAGE",
        Tier::Remote => "EXTERNAL",
    }
    .into()
}
