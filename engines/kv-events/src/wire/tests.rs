//! Batches as engines wrote them: captured from vLLM 0.32, or made up with the definitions of older ones.

use dynamo_engine_api::{EngineHash, StoredBlocks, Tier};
use rmpv::Value;

use super::*;
use crate::publish::Form;

const VLLM: &str = include_str!("../../tests/fixtures/vllm_0.32.jsonl");
const BYTES: &str = include_str!("../../tests/fixtures/vllm_bytes_hash.jsonl");
const POSITIONAL: &str = include_str!("../../tests/fixtures/vllm_positional_made_up.jsonl");

/// Payloads of one kind of lines.
fn payloads(fixture: &str, kind: &str) -> Vec<Vec<u8>> {
    let hex = |text: &str| (0..text.len()).step_by(2).map(|at| u8::from_str_radix(&text[at..at + 2], 16).unwrap()).collect();
    let lines = fixture.lines().map(|line| serde_json::from_str::<serde_json::Value>(line).unwrap());
    lines
        .filter(|line| line["kind"] == kind)
        .map(|line| hex(line["frames"].as_array().unwrap().last().unwrap().as_str().unwrap()))
        .collect()
}

fn decode(payload: &[u8]) -> Batch {
    Decoder::default().decode(payload).unwrap()
}

fn stored(batch: &Batch) -> Vec<&StoredBlocks> {
    batch.events.iter().filter_map(|event| if let KvEvent::Stored(stored) = event { Some(stored) } else { None }).collect()
}

/// A batch of one event.
fn one(event: Value) -> Batch {
    let mut bytes = Vec::new();
    rmpv::encode::write_value(&mut bytes, &Value::Array(vec![1.5.into(), Value::Array(vec![event]), 0.into()])).unwrap();
    decode(&bytes)
}

fn map(fields: Vec<(&str, Value)>) -> Value {
    Value::Map(fields.into_iter().map(|(name, value)| (name.into(), value)).collect())
}

fn list(values: impl IntoIterator<Item = impl Into<Value>>) -> Value {
    Value::Array(values.into_iter().map(Into::into).collect())
}

/// A stored event of two blocks of two tokens, with fields that are other.
fn two_blocks(changes: Vec<(&'static str, Value)>) -> Value {
    let mut fields = vec![
        ("type", "BlockStored".into()),
        ("block_hashes", list([7u64, 8])),
        ("parent_block_hash", Value::Nil),
        ("token_ids", list([1, 2, 3, 4])),
        ("block_size", 2.into()),
        ("medium", "GPU".into()),
    ];
    for (name, value) in changes {
        fields.retain(|(known, _)| *known != name);
        fields.push((name, value));
    }
    map(fields)
}

#[track_caller]
fn left_out(event: Value, cause: Cause) {
    let batch = one(event);
    assert_eq!((batch.events.len(), batch.left_out.get(&cause)), (0, Some(&1)), "{batch:?}");
}

#[test]
fn what_vllm_published_is_read_in_full() {
    let batches: Vec<Batch> = payloads(VLLM, "pub").iter().map(|payload| decode(payload)).collect();
    assert!(batches.iter().all(|batch| batch.left_out.is_empty() && batch.rank == Some(0) && batch.timestamp > 1.7e9));
    let cold = stored(&batches[0])[0];
    assert_eq!(
        (cold.parent, cold.block_size, cold.tier, &cold.adapter, &cold.cache_salt),
        (None, 32, Tier::Device, &None, &None)
    );
    assert_eq!((cold.hashes.len(), cold.tokens.clone()), (3, (1000..1096).collect()));
    let child = stored(&batches[1])[0];
    assert_eq!((child.parent, child.tokens[0]), (Some(cold.hashes[1]), 2000));
    let salted = stored(&batches[2])[0];
    assert_eq!((salted.cache_salt.as_deref(), salted.hashes.len(), salted.tokens == cold.tokens), (Some("tenantA"), 3, true));
    assert_eq!((stored(&batches[3])[0].adapter.as_deref(), &stored(&batches[3])[0].cache_salt), (Some("sql"), &None));
    let removed = |batch: &Batch| batch.events.iter().filter(|event| matches!(event, KvEvent::Removed { .. })).count();
    assert_eq!((removed(&batches[4]), removed(&batches[5])), (9, 1));
    assert!(matches!(batches[7].events[..], [KvEvent::Cleared, KvEvent::Stored(_)]));
}

#[test]
fn a_replayed_batch_is_the_published_one() {
    assert_eq!(payloads(VLLM, "replay")[0], payloads(VLLM, "pub")[0]);
    assert!(payloads(VLLM, "replay")[2].is_empty());
}

#[test]
fn hashes_of_32_bytes_count_by_their_last_eight() {
    let batches: Vec<Batch> = payloads(BYTES, "pub").iter().map(|payload| decode(payload)).collect();
    assert!(batches.iter().all(|batch| batch.left_out.is_empty()));
    assert_eq!(stored(&batches[0])[0].hashes, [EngineHash(0xd15e_f574_6504_ab48)]);
    assert_eq!(stored(&batches[1])[0].parent, Some(EngineHash(0xd15e_f574_6504_ab48)));
    let removed = KvEvent::Removed { hashes: vec![EngineHash(0x20d3_81c2_50ca_58cc)], tier: Tier::Device };
    assert_eq!(batches[3].events, [removed]);
}

#[test]
fn events_of_every_older_vllm_are_read_by_place() {
    for payload in payloads(POSITIONAL, "made_up") {
        let batch = decode(&payload);
        assert_eq!(batch.events.len(), 3, "{batch:?}");
        let stored = stored(&batch)[0];
        assert_eq!((stored.block_size, stored.tier, stored.hashes[0]), (16, Tier::Device, EngineHash(9_782_116_904_379_918_778)));
        // Those with extra keys have one on the second block, where no salt is.
        let blocks = 2 - batch.left_out.get(&Cause::Multimodal).map_or(0, |events| *events as usize);
        assert_eq!((stored.hashes.len(), stored.tokens.len(), batch.left_out.len()), (blocks, 16 * blocks, 2 - blocks));
        assert!(matches!(batch.events[1..], [KvEvent::Removed { tier: Tier::Device, .. }, KvEvent::Cleared]));
    }
}

#[test]
fn what_is_written_is_read_in_both_forms() {
    let first = StoredBlocks {
        parent: None,
        hashes: vec![EngineHash(u64::MAX), EngineHash(2)],
        tokens: vec![1, 2, 3, u32::MAX],
        block_size: 2,
        tier: Tier::Host,
        adapter: Some("sql".into()),
        cache_salt: Some("t".into()),
    };
    let second = StoredBlocks { parent: Some(EngineHash(2)), tier: Tier::Remote, cache_salt: None, ..first.clone() };
    let removed = KvEvent::Removed { hashes: vec![EngineHash(9)], tier: Tier::Disk };
    let events = vec![KvEvent::Stored(first), KvEvent::Stored(second), removed, KvEvent::Cleared];
    for form in [Form::Map, Form::Positional] {
        let batch = decode(&encode(2.5, &events, 3, form));
        assert_eq!(batch, Batch { timestamp: 2.5, rank: Some(3), events: events.clone(), ..Batch::default() });
    }
}

#[test]
fn a_batch_of_nothing_is_a_sign_of_life_and_another_payload_is_an_error() {
    assert_eq!(decode(&encode(1.0, &[], 0, Form::Map)).events, []);
    let mut decoder = Decoder::default();
    assert!(decoder.decode(b"").unwrap_err().to_string().contains("not MessagePack"));
    assert!(decoder.decode(&[0xc0]).unwrap_err().to_string().contains("no array"));
    assert!(decoder.decode(&[0x92, 0xc0, 0x90]).unwrap_err().to_string().contains("something else"));
}

#[test]
fn fields_and_types_that_are_not_known_do_no_harm() {
    let batch = one(two_blocks(vec![("session_id", "s".into()), ("new_field", list([1])), ("locality", "LOCAL".into())]));
    assert_eq!((stored(&batch).len(), batch.left_out.len()), (1, 0));
    left_out(map(vec![("type", "BlockMoved".into())]), Cause::UnknownType);
    left_out(list(["BlockMoved"]), Cause::UnknownType);
    left_out(Value::Nil, Cause::Malformed);
    assert_eq!(one(map(vec![("type", "Ignored".into())])).left_out.len(), 0);
}

#[test]
fn signed_hashes_are_the_same_eight_bytes() {
    let batch = one(two_blocks(vec![("block_hashes", list([-1i64, 5])), ("parent_block_hash", (-2i64).into())]));
    assert_eq!(stored(&batch)[0].hashes, [EngineHash(u64::MAX), EngineHash(5)]);
    assert_eq!(stored(&batch)[0].parent, Some(EngineHash(u64::MAX - 1)));
}

#[test]
fn what_no_prompt_could_be_matched_with_is_left_out_by_its_cause() {
    left_out(two_blocks(vec![("token_ids", list([1, 2, 3]))]), Cause::TokenCount);
    left_out(two_blocks(vec![("block_size", 3.into())]), Cause::TokenCount);
    left_out(two_blocks(vec![("block_size", 0.into())]), Cause::Malformed);
    left_out(two_blocks(vec![("block_hashes", list(["x"]))]), Cause::Malformed);
    left_out(two_blocks(vec![("token_ids", list([1u64 << 40, 2, 3, 4]))]), Cause::Malformed);
    let pairs = Value::Array(vec![list([1, 2]), list([2, 3])]);
    left_out(two_blocks(vec![("token_ids", pairs)]), Cause::Bigram);
    left_out(two_blocks(vec![("kv_cache_spec_kind", "sliding_window".into())]), Cause::Attention);
    left_out(two_blocks(vec![("locality", "REMOTE".into())]), Cause::Locality);
    left_out(two_blocks(vec![("medium", "TAPE".into())]), Cause::Medium);
    left_out(two_blocks(vec![("lora_id", 3.into())]), Cause::Adapter);
    for kind in ["full_attention", "mla_attention", "sink_full_attention", "full"] {
        assert_eq!(stored(&one(two_blocks(vec![("kv_cache_spec_kind", kind.into())]))).len(), 1, "{kind}");
    }
}

#[test]
fn a_removal_that_cannot_be_read_demands_a_reset_and_nothing_else_does() {
    let removed = |hashes: Value, medium: &str| {
        map(vec![("type", "BlockRemoved".into()), ("block_hashes", hashes), ("medium", medium.into())])
    };
    for event in [removed(list(["x"]), "GPU"), removed(Value::Nil, "GPU"), list(["BlockRemoved"])] {
        let batch = one(event);
        assert_eq!((batch.must_reset, batch.left_out.get(&Cause::Malformed)), (true, Some(&1)), "{batch:?}");
    }
    assert!(!one(removed(list([7u64]), "GPU")).must_reset);
    assert!(!one(removed(list([7u64]), "TAPE")).must_reset);
    assert!(!one(two_blocks(vec![("block_hashes", list(["x"]))])).must_reset);
}

#[test]
fn media_are_tiers() {
    for (medium, tier) in [
        ("GPU", Tier::Device),
        ("CPU", Tier::Host),
        ("CPU_PINNED", Tier::Host),
        ("DISK", Tier::Disk),
        ("STORAGE", Tier::Disk),
        ("EXTERNAL", Tier::Remote),
    ] {
        assert_eq!(stored(&one(two_blocks(vec![("medium", medium.into())])))[0].tier, tier);
    }
    assert_eq!(stored(&one(two_blocks(vec![("medium", Value::Nil)])))[0].tier, Tier::Device);
}

#[test]
fn removals_of_a_group_that_does_not_count_do_not_either() {
    let mut decoder = Decoder::default();
    let mut bytes = Vec::new();
    let other = two_blocks(vec![("kv_cache_spec_kind", "sliding_window".into()), ("group_idx", 1.into())]);
    let removed =
        |group: u64| map(vec![("type", "BlockRemoved".into()), ("block_hashes", list([7u64])), ("group_idx", group.into())]);
    let events = Value::Array(vec![other, removed(1), removed(0)]);
    rmpv::encode::write_value(&mut bytes, &Value::Array(vec![1.0.into(), events])).unwrap();
    let batch = decoder.decode(&bytes).unwrap();
    assert_eq!((batch.events.len(), batch.left_out[&Cause::Attention]), (1, 2));
}

#[test]
fn salts_come_from_the_first_block_and_images_cut_a_sequence_short() {
    let keys = |keys: Vec<Value>| two_blocks(vec![("extra_keys", Value::Array(keys))]);
    let salted = one(keys(vec![list(["t"]), Value::Nil]));
    assert_eq!((stored(&salted)[0].cache_salt.as_deref(), stored(&salted)[0].hashes.len()), (Some("t"), 2));
    let named =
        one(two_blocks(vec![("lora_name", "t".into()), ("extra_keys", Value::Array(vec![list(["t", "t"]), list(["t"])]))]));
    let [named] = stored(&named)[..] else { panic!("{named:?}") };
    assert_eq!((named.adapter.as_deref(), named.cache_salt.as_deref(), named.hashes.len()), (Some("t"), Some("t"), 2));
    // SGLang has a field for it, and an object in the place of the adapter's name.
    assert_eq!(stored(&one(two_blocks(vec![("cache_salt", "t".into())])))[0].cache_salt.as_deref(), Some("t"));
    let by_place = Value::Array(vec![
        "BlockStored".into(),
        list([7u64]),
        Value::Nil,
        list([1, 2]),
        2.into(),
        Value::Nil,
        "GPU".into(),
        map(vec![("cache_salt", "t".into())]),
    ]);
    assert_eq!(stored(&one(by_place))[0].cache_salt.as_deref(), Some("t"));
    // An image is an identifier with an offset.
    let image = one(keys(vec![Value::Nil, Value::Array(vec![Value::Array(vec!["img".into(), 0.into()])])]));
    assert_eq!((stored(&image)[0].hashes.len(), stored(&image)[0].tokens.len(), image.left_out[&Cause::Multimodal]), (1, 2, 1));
    let at_once = one(keys(vec![Value::Array(vec![Value::Array(vec!["img".into(), 0.into()]), "t".into()]), Value::Nil]));
    assert_eq!((at_once.events.len(), at_once.left_out[&Cause::Multimodal]), (0, 1));
    let infos = one(two_blocks(vec![("block_mm_infos", Value::Array(vec![Value::Nil, list([1])]))]));
    assert_eq!((infos.events.len(), infos.left_out[&Cause::Multimodal]), (0, 1));
}
