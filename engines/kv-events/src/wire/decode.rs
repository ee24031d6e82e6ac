//! Reading a batch.

use std::{collections::BTreeSet, sync::Arc};

use dynamo_engine_api::{EngineHash, KvEvent, StoredBlocks, Tier};
use rmpv::Value;

use super::{Batch, Cause, WireError};

/// Largest block that is believed.
const MAX_BLOCK_SIZE: u64 = 1 << 20;

/// Reads one publisher's batches. It remembers which of its layer groups do not count, since removals only name the group.
#[derive(Debug, Default)]
pub struct Decoder {
    other_groups: BTreeSet<u64>,
}

impl Decoder {
    /// Reads a batch.
    ///
    /// # Errors
    /// If it is no batch at all. What is wrong with a single event is in [`Batch::left_out`].
    pub fn decode(&mut self, payload: &[u8]) -> Result<Batch, WireError> {
        let mut rest = payload;
        let value = rmpv::decode::read_value(&mut rest).map_err(|error| WireError::MessagePack(error.to_string()))?;
        let Value::Array(parts) = value else { return Err(WireError::Shape("no array")) };
        let mut parts = parts.into_iter();
        let (Some(timestamp), Some(Value::Array(events))) = (parts.next().and_then(|at| number(&at)), parts.next()) else {
            return Err(WireError::Shape("an array of something else"));
        };
        let rank = parts.next().and_then(|rank| rank.as_u64()).and_then(|rank| u32::try_from(rank).ok());
        let mut batch = Batch { timestamp, rank, ..Batch::default() };
        for event in events {
            match self.event(&event) {
                Ok((event, cause)) => {
                    batch.events.extend(event);
                    cause.into_iter().for_each(|cause| *batch.left_out.entry(cause).or_default() += 1);
                }
                Err(cause) => {
                    batch.must_reset |= cause == Cause::Malformed && Fields::of(&event).is_some_and(|fields| fields.removes());
                    *batch.left_out.entry(cause).or_default() += 1;
                }
            }
        }
        Ok(batch)
    }

    /// An event, and why a part of it was left out. An event that means nothing to anybody is neither.
    fn event(&mut self, value: &Value) -> Result<(Option<KvEvent>, Option<Cause>), Cause> {
        let fields = Fields::of(value).ok_or(Cause::Malformed)?;
        match fields.kind {
            "BlockStored" => self.stored(&fields).map(|(event, cause)| (event.map(KvEvent::Stored), cause)),
            "BlockRemoved" => {
                self.check_group(&fields)?;
                check_locality(&fields)?;
                let (hashes, tier) = (hashes(fields.get("block_hashes"))?, tier(fields.get("medium"))?);
                Ok((Some(KvEvent::Removed { hashes, tier }), None))
            }
            "AllBlocksCleared" => {
                self.other_groups.clear();
                Ok((Some(KvEvent::Cleared), None))
            }
            "Ignored" => Ok((None, None)),
            _ => Err(Cause::UnknownType),
        }
    }

    fn stored(&mut self, fields: &Fields<'_>) -> Result<(Option<StoredBlocks>, Option<Cause>), Cause> {
        self.check_group(fields)?;
        check_locality(fields)?;
        let tier = tier(fields.get("medium"))?;
        let mut hashes = hashes(fields.get("block_hashes"))?;
        let parent = fields.get("parent_block_hash").filter(|value| !value.is_nil()).map(hash).transpose()?;
        let block_size = fields.get("block_size").and_then(Value::as_u64).filter(|size| (1..=MAX_BLOCK_SIZE).contains(size));
        let block_size = block_size.ok_or(Cause::Malformed)? as usize;
        let mut tokens = tokens(fields.get("token_ids"))?;
        if tokens.len() != hashes.len() * block_size {
            return Err(Cause::TokenCount);
        }
        let adapter = fields.text("lora_name");
        if adapter.is_none() && fields.get("lora_id").is_some_and(|id| !id.is_nil()) {
            return Err(Cause::Adapter);
        }
        let keys = keys(fields, parent.is_none(), adapter.as_deref(), hashes.len());
        if keys.plain_blocks < hashes.len() {
            hashes.truncate(keys.plain_blocks);
            tokens.truncate(keys.plain_blocks * block_size);
        }
        let cause = keys.cause;
        let cache_salt = fields.text("cache_salt").or(keys.cache_salt);
        let block_size = block_size as u32;
        let stored = StoredBlocks { parent, hashes, tokens, block_size, tier, adapter, cache_salt };
        Ok(((!stored.hashes.is_empty()).then_some(stored), cause))
    }

    /// Only groups whose blocks are kept for whole prefixes tell what is cached of a prompt.
    fn check_group(&mut self, fields: &Fields<'_>) -> Result<(), Cause> {
        let group = fields.get("group_idx").and_then(Value::as_u64);
        if let Some(kind) = fields.text("kv_cache_spec_kind") {
            let is_whole = matches!(kind.strip_suffix("_attention").unwrap_or(&kind), "full" | "mla" | "sink_full");
            if !is_whole {
                self.other_groups.extend(group);
                return Err(Cause::Attention);
            }
        }
        if group.is_some_and(|group| self.other_groups.contains(&group)) { Err(Cause::Attention) } else { Ok(()) }
    }
}

/// An event's fields, by name in both forms.
struct Fields<'a> {
    kind: &'a str,
    form: FormOf<'a>,
}

enum FormOf<'a> {
    Map(&'a [(Value, Value)]),
    /// Without the type, with the names of the places.
    Array(&'a [Value], &'static [&'static str]),
}

/// Places of a stored event's fields, after its type.
const STORED: &[&str] = &[
    "block_hashes",
    "parent_block_hash",
    "token_ids",
    "block_size",
    "lora_id",
    "medium",
    "lora_name",
    "extra_keys",
    "group_idx",
    "kv_cache_spec_kind",
    "kv_cache_spec_sliding_window",
    "locality",
    "ownership",
];
/// The same of publishers that put what blocks hold of images before the tail.
const STORED_WITH_IMAGES: &[&str] = &[
    "block_hashes",
    "parent_block_hash",
    "token_ids",
    "block_size",
    "lora_id",
    "medium",
    "lora_name",
    "extra_keys",
    "block_mm_infos",
    "group_idx",
    "kv_cache_spec_kind",
    "kv_cache_spec_sliding_window",
    "locality",
    "ownership",
];
const REMOVED: &[&str] = &["block_hashes", "medium", "group_idx", "locality", "ownership"];
/// The same of publishers that give removals the tail of stored events.
const REMOVED_WITH_KIND: &[&str] =
    &["block_hashes", "medium", "group_idx", "kv_cache_spec_kind", "kv_cache_spec_sliding_window", "locality", "ownership"];

impl<'a> Fields<'a> {
    fn of(value: &'a Value) -> Option<Self> {
        match value {
            Value::Map(fields) => {
                let kind = fields.iter().find(|(name, _)| name.as_str() == Some("type"))?.1.as_str()?;
                Some(Self { kind, form: FormOf::Map(fields) })
            }
            Value::Array(fields) => {
                let (kind, fields) = fields.split_first()?;
                let kind = kind.as_str()?;
                let is_list = |place: usize| fields.get(place).is_some_and(Value::is_array);
                let is_place = |value: &Value| matches!(value.as_str(), Some("LOCAL" | "REMOTE"));
                let names = match kind {
                    "BlockStored" if is_list(8) => STORED_WITH_IMAGES,
                    "BlockStored" => STORED,
                    "BlockRemoved" if fields.len() > 3 && !fields.get(3).is_some_and(is_place) => REMOVED_WITH_KIND,
                    _ => REMOVED,
                };
                Some(Self { kind, form: FormOf::Array(fields, names) })
            }
            _ => None,
        }
    }

    fn removes(&self) -> bool {
        matches!(self.kind, "BlockRemoved" | "AllBlocksCleared")
    }

    fn get(&self, name: &str) -> Option<&'a Value> {
        match self.form {
            FormOf::Map(fields) => fields.iter().find(|(known, _)| known.as_str() == Some(name)).map(|(_, value)| value),
            FormOf::Array(fields, names) => {
                let found = names.iter().position(|known| *known == name).and_then(|place| fields.get(place));
                // SGLang puts an object in the place of the adapter's name.
                if name == "cache_salt" {
                    let Some(Value::Map(object)) = fields.get(6) else { return None };
                    return object.iter().find(|(known, _)| known.as_str() == Some(name)).map(|(_, value)| value);
                }
                found
            }
        }
    }

    fn text(&self, name: &str) -> Option<Arc<str>> {
        self.get(name)?.as_str().filter(|text| !text.is_empty()).map(Arc::from)
    }
}

/// What the extra keys of an event's blocks tell.
struct Keys {
    /// Blocks from the first whose content is told by tokens alone.
    plain_blocks: usize,
    cache_salt: Option<Arc<str>>,
    cause: Option<Cause>,
}

/// Of each block: the adapter's name, then images as (identifier, offset), then the salt on the first block of a sequence,
/// then embeddings. Untagged, so that a lone text on the first block is taken for the salt: were it an image's, as engines
/// wrote it once, then no salted prompt is like it either.
fn keys(fields: &Fields<'_>, is_root: bool, adapter: Option<&str>, blocks: usize) -> Keys {
    let mut keys = Keys { plain_blocks: blocks, cache_salt: None, cause: None };
    let has_image = |infos: &Value| infos.as_array().is_none_or(|infos| infos.iter().any(|info| !info.is_nil()));
    if fields.get("block_mm_infos").filter(|infos| !infos.is_nil()).is_some_and(has_image) {
        return Keys { plain_blocks: 0, cause: Some(Cause::Multimodal), ..keys };
    }
    let Some(Value::Array(by_block)) = fields.get("extra_keys") else { return keys };
    for (block, of_block) in by_block.iter().enumerate().take(blocks) {
        let Value::Array(of_block) = of_block else { continue };
        // Once: a salt may be the same text.
        let named = of_block.iter().position(|key| adapter.is_some() && key.as_str() == adapter);
        let mut others = of_block.iter().enumerate().filter(|(at, _)| Some(*at) != named).map(|(_, key)| key);
        match (others.next(), others.next()) {
            (None, _) => {}
            (Some(Value::String(salt)), None) if is_root && block == 0 => keys.cache_salt = salt.as_str().map(Arc::from),
            _ => return Keys { plain_blocks: block, cause: Some(Cause::Multimodal), ..keys },
        }
    }
    keys
}

fn check_locality(fields: &Fields<'_>) -> Result<(), Cause> {
    match fields.get("locality") {
        None | Some(Value::Nil) => Ok(()),
        Some(place) if place.as_str() == Some("LOCAL") => Ok(()),
        Some(_) => Err(Cause::Locality),
    }
}

fn tier(medium: Option<&Value>) -> Result<Tier, Cause> {
    match medium {
        None | Some(Value::Nil) => Ok(Tier::Device),
        Some(medium) => match medium.as_str() {
            Some("GPU") => Ok(Tier::Device),
            Some("CPU" | "CPU_PINNED") => Ok(Tier::Host),
            Some("DISK" | "STORAGE") => Ok(Tier::Disk),
            Some("EXTERNAL") => Ok(Tier::Remote),
            _ => Err(Cause::Medium),
        },
    }
}

fn hashes(value: Option<&Value>) -> Result<Vec<EngineHash>, Cause> {
    value.and_then(Value::as_array).ok_or(Cause::Malformed)?.iter().map(hash).collect()
}

/// vLLM publishes the last 8 bytes of its digests as a number, or all of them; SGLang's numbers are signed.
fn hash(value: &Value) -> Result<EngineHash, Cause> {
    let hash = match value {
        Value::Integer(number) => number.as_u64().or_else(|| number.as_i64().map(i64::cast_unsigned)),
        Value::Binary(bytes) => bytes.last_chunk().map(|last| u64::from_be_bytes(*last)),
        _ => None,
    };
    hash.map(EngineHash).ok_or(Cause::Malformed)
}

fn tokens(value: Option<&Value>) -> Result<Vec<u32>, Cause> {
    let values = value.and_then(Value::as_array).ok_or(Cause::Malformed)?;
    if values.first().is_some_and(Value::is_array) {
        return Err(Cause::Bigram);
    }
    let token = |value: &Value| value.as_u64().and_then(|token| u32::try_from(token).ok());
    values.iter().map(token).collect::<Option<_>>().ok_or(Cause::Malformed)
}

fn number(value: &Value) -> Option<f64> {
    value.as_f64().filter(|number| number.is_finite())
}
