//! A slot's state: what policies keep between calls, shared by all instances and versions.
//!
//! Bounded in entries and bytes; an entry that expired makes room before a new one is refused. It lives in memory.

use std::{
    collections::{BTreeSet, HashMap},
    sync::{Arc, Mutex, PoisonError},
};

use dynamo_host_core::SlotName;

use crate::world::World;

const MAX_KEY_BYTES: usize = 128;
const MAX_VALUE_BYTES: usize = 4096;
const MAX_ENTRIES: usize = 65_536;
const MAX_BYTES: usize = 16 << 20;
/// What an entry costs besides its key and value.
const ENTRY_BYTES: usize = 64;
/// How often a full state looks for entries that expired.
const SWEEP_EVERY_MS: u64 = 1000;
/// Metrics of a slot's policies, so that names made from data cannot flood the exporter.
const MAX_METRICS: usize = 64;

/// Why state was not kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum StateError {
    Quota,
    TooLarge,
    WrongKind,
}

impl StateError {
    /// The contract's code.
    pub(crate) fn code(self) -> u32 {
        match self {
            Self::Quota => 1,
            Self::TooLarge => 2,
            Self::WrongKind => 3,
        }
    }
}

#[derive(Debug)]
enum Value {
    Bytes(Vec<u8>),
    Counter(i64),
    Bucket { level: f64, at_ms: u64 },
}

#[derive(Debug)]
struct Entry {
    value: Value,
    /// `u64::MAX`: never.
    expires_ms: u64,
}

#[derive(Debug, Default)]
struct Entries {
    map: HashMap<String, Entry>,
    bytes: usize,
    next_sweep_ms: u64,
}

/// State of one slot.
#[derive(Debug, Default)]
pub struct SlotState {
    /// The slot's name; empty for scratch state.
    slot: Arc<str>,
    /// The world whose policies decide in the slot; `None` for scratch state.
    world: Option<&'static World>,
    entries: Mutex<Entries>,
    metrics: Mutex<BTreeSet<String>>,
    /// Log lines that may be written now, and when that was.
    log_lines: Mutex<Option<(f64, u64)>>,
}

impl SlotState {
    /// Empty state of a slot.
    #[must_use]
    pub fn of(slot: &SlotName) -> Self {
        Self { slot: slot.to_string().into(), world: World::of_slot(slot.kind), ..Self::default() }
    }

    /// The world whose policies may have it; `None`: all may.
    pub(crate) fn world(&self) -> Option<&'static World> {
        self.world
    }

    /// The slot's name.
    pub(crate) fn slot(&self) -> &Arc<str> {
        &self.slot
    }

    pub(crate) fn get(&self, key: &str, now_ms: u64) -> Option<Vec<u8>> {
        if key.len() > MAX_KEY_BYTES {
            return None;
        }
        self.with(|entries| match entries.live(key, now_ms)? {
            Entry { value: Value::Bytes(bytes), .. } => Some(bytes.clone()),
            _ => None,
        })
    }

    pub(crate) fn set(&self, key: &str, value: Vec<u8>, ttl_ms: u32, now_ms: u64) -> Result<(), StateError> {
        if value.len() > MAX_VALUE_BYTES {
            return Err(StateError::TooLarge);
        }
        self.with(|entries| {
            let entry = entries.entry(key, now_ms, value.len(), || Value::Bytes(Vec::new()))?;
            let Value::Bytes(bytes) = &mut entry.value else { return Err(StateError::WrongKind) };
            let (old, new) = (bytes.len(), value.len());
            *bytes = value;
            entry.expires_ms = expiry(ttl_ms, now_ms);
            entries.bytes = entries.bytes + new - old;
            Ok(())
        })
    }

    pub(crate) fn add(&self, key: &str, delta: i64, ttl_ms: u32, now_ms: u64) -> Result<i64, StateError> {
        self.with(|entries| {
            let entry = entries.entry(key, now_ms, 0, || Value::Counter(0))?;
            let Value::Counter(counter) = &mut entry.value else { return Err(StateError::WrongKind) };
            *counter = counter.wrapping_add(delta);
            entry.expires_ms = expiry(ttl_ms, now_ms);
            Ok(*counter)
        })
    }

    /// Within: what remains, or milliseconds until the amount is there (`u32::MAX`: never). A negative amount gives back.
    pub(crate) fn take(
        &self,
        key: &str,
        amount: f64,
        per_second: f64,
        burst: f64,
        now_ms: u64,
    ) -> Result<Result<f64, u32>, StateError> {
        let sane = amount.is_finite() && [per_second, burst].iter().all(|value| value.is_finite() && *value >= 0.0);
        if !sane || amount > burst {
            return Ok(Err(u32::MAX));
        }
        self.with(|entries| {
            let entry = entries.entry(key, now_ms, 0, || Value::Bucket { level: burst, at_ms: now_ms })?;
            let Value::Bucket { level, at_ms } = &mut entry.value else { return Err(StateError::WrongKind) };
            let elapsed_s = now_ms.saturating_sub(*at_ms) as f64 / 1000.0;
            *level = (*level + elapsed_s * per_second).min(burst);
            *at_ms = now_ms.max(*at_ms);
            // Casts saturate: a refill of next to nothing is "never".
            let ms_until = |target: f64, level: f64| ((target - level) / per_second * 1000.0).ceil();
            let taken = if *level >= amount {
                *level = (*level - amount).min(burst);
                Ok(*level)
            } else {
                Err(ms_until(amount, *level) as u32)
            };
            // A full bucket is the same as none.
            entry.expires_ms = now_ms.saturating_add((ms_until(burst, *level) as u64).max(1));
            Ok(taken)
        })
    }

    /// Whether the slot's policies may log one more line now.
    pub(crate) fn may_log(&self, per_second: f64, now_ms: u64) -> bool {
        let burst = 4.0 * per_second;
        let mut lines = self.log_lines.lock().unwrap_or_else(PoisonError::into_inner);
        let (left, at_ms) = lines.unwrap_or((burst, now_ms));
        let left = (left + now_ms.saturating_sub(at_ms) as f64 / 1000.0 * per_second).min(burst);
        let may = left >= 1.0;
        *lines = Some((if may { left - 1.0 } else { left }, now_ms.max(at_ms)));
        may
    }

    /// The metric name to export for what a policy called a metric; `None` if there are too many.
    pub(crate) fn metric_name(&self, name: &str) -> Option<String> {
        let name: String = name.chars().take(64).map(|c| if c.is_ascii_alphanumeric() { c } else { '_' }).collect();
        let mut metrics = self.metrics.lock().unwrap_or_else(PoisonError::into_inner);
        if metrics.contains(&name) {
            return Some(name);
        }
        (metrics.len() < MAX_METRICS && !name.is_empty()).then(|| {
            metrics.insert(name.clone());
            name
        })
    }

    /// Lets go of everything if nothing more fits; whether it did. What a bad policy has filled must not starve the good
    /// one that takes its place.
    pub(crate) fn clear_if_full(&self) -> bool {
        self.with(|entries| {
            let is_full = entries.map.len() >= MAX_ENTRIES || entries.bytes + MAX_VALUE_BYTES + ENTRY_BYTES > MAX_BYTES;
            if is_full {
                *entries = Entries::default();
            }
            is_full
        })
    }

    fn with<R>(&self, work: impl FnOnce(&mut Entries) -> R) -> R {
        work(&mut self.entries.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

impl Entries {
    fn live(&self, key: &str, now_ms: u64) -> Option<&Entry> {
        self.map.get(key).filter(|entry| entry.expires_ms > now_ms)
    }

    /// The entry of `key`, made if there is none or an expired one. `value_bytes` is what it is about to hold.
    fn entry(
        &mut self,
        key: &str,
        now_ms: u64,
        value_bytes: usize,
        make: impl FnOnce() -> Value,
    ) -> Result<&mut Entry, StateError> {
        if key.is_empty() || key.len() > MAX_KEY_BYTES {
            return Err(StateError::TooLarge);
        }
        if self.map.get(key).is_some_and(|entry| entry.expires_ms <= now_ms) {
            self.remove(key);
        }
        let is_new = !self.map.contains_key(key);
        let added = value_bytes + if is_new { key.len() + ENTRY_BYTES } else { 0 };
        let fits = |entries: &Self| entries.map.len() + usize::from(is_new) <= MAX_ENTRIES && entries.bytes + added <= MAX_BYTES;
        // A sweep looks at every entry: one that finds nothing must not be repeated by every request.
        if !fits(self) && now_ms >= self.next_sweep_ms {
            self.sweep(now_ms);
            self.next_sweep_ms = now_ms + SWEEP_EVERY_MS;
        }
        if !fits(self) {
            return Err(StateError::Quota);
        }
        if is_new {
            self.bytes += key.len() + ENTRY_BYTES;
            self.map.insert(key.to_owned(), Entry { value: make(), expires_ms: u64::MAX });
        }
        Ok(self.map.get_mut(key).expect("it was there or has just been made"))
    }

    fn sweep(&mut self, now_ms: u64) {
        let expired: Vec<String> =
            self.map.iter().filter(|(_, entry)| entry.expires_ms <= now_ms).map(|(key, _)| key.clone()).collect();
        for key in expired {
            self.remove(&key);
        }
    }

    fn remove(&mut self, key: &str) {
        if let Some(entry) = self.map.remove(key) {
            let value = if let Value::Bytes(bytes) = &entry.value { bytes.len() } else { 0 };
            self.bytes -= key.len() + ENTRY_BYTES + value;
        }
    }
}

fn expiry(ttl_ms: u32, now_ms: u64) -> u64 {
    if ttl_ms == 0 { u64::MAX } else { now_ms + u64::from(ttl_ms) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_and_counters_last_until_they_expire() {
        let state = SlotState::default();
        state.set("k", b"v".to_vec(), 10, 100).unwrap();
        assert_eq!(state.get("k", 109), Some(b"v".to_vec()));
        assert_eq!(state.get("k", 110), None);
        assert_eq!(state.add("n", 2, 0, 0), Ok(2));
        assert_eq!(state.add("n", -5, 0, u64::MAX - 1), Ok(-3));
        assert_eq!(state.add("k", 1, 0, 200), Ok(1), "an expired entry may become another kind");
        assert_eq!(state.set("k", Vec::new(), 0, 200), Err(StateError::WrongKind));
    }

    #[test]
    fn a_bucket_gives_what_it_has_and_says_when_there_is_more() {
        let state = SlotState::default();
        assert_eq!(state.take("b", 3.0, 2.0, 4.0, 0), Ok(Ok(1.0)));
        assert_eq!(state.take("b", 3.0, 2.0, 4.0, 0), Ok(Err(1000)));
        assert_eq!(state.take("b", 3.0, 2.0, 4.0, 1000), Ok(Ok(0.0)));
        assert_eq!(state.take("b", 5.0, 2.0, 4.0, 0), Ok(Err(u32::MAX)), "more than the burst never fits");
        assert_eq!(state.take("b", f64::NAN, 2.0, 4.0, 0), Ok(Err(u32::MAX)));
        assert_eq!(state.take("b", -1.5, 2.0, 4.0, 1000), Ok(Ok(1.5)), "what was not used is given back");
        assert_eq!(state.take("b", -100.0, 2.0, 4.0, 1000), Ok(Ok(4.0)), "up to the burst");
        assert_eq!(state.take("c", 1.0, 0.0, 1.0, 0), Ok(Ok(0.0)));
        assert_eq!(state.take("c", 1.0, 0.0, 1.0, 5), Ok(Err(u32::MAX)), "without refill it never comes");
        state.add("n", 1, 0, 0).unwrap();
        assert_eq!(state.take("n", 1.0, 1.0, 1.0, 0), Err(StateError::WrongKind));
    }

    #[test]
    fn a_bucket_that_is_full_again_takes_no_room() {
        let state = SlotState::default();
        for second in 0..10u64 {
            for tenant in 0..MAX_ENTRIES {
                let taken = state.take(&format!("{second}/{tenant}"), 1.0, 10.0, 1.0, second * 2000);
                assert_eq!(taken, Ok(Ok(0.0)), "each bucket is full again after 100 ms");
            }
        }
    }

    #[test]
    fn the_quota_holds_and_expired_entries_make_room() {
        let state = SlotState::default();
        for i in 0..MAX_ENTRIES {
            state.add(&i.to_string(), 1, 10, 0).unwrap();
        }
        assert_eq!(state.add("more", 1, 0, 5), Err(StateError::Quota));
        assert_eq!(state.add("0", 1, 10, 5), Ok(2), "what is there can still change");
        assert_eq!(state.add("more", 1, 0, 5 + SWEEP_EVERY_MS), Ok(1));
        let value = vec![0; MAX_VALUE_BYTES];
        let kept = (0..).take_while(|i| state.set(&format!("v{i}"), value.clone(), 0, 2000).is_ok()).count();
        assert!((3900..4097).contains(&kept), "{kept} values of 4 KiB fit into 16 MiB");
    }

    #[test]
    fn full_state_can_be_cleared_and_other_state_stays() {
        let state = SlotState::default();
        state.add("n", 1, 0, 0).unwrap();
        assert!(!state.clear_if_full());
        assert_eq!(state.add("n", 1, 0, 0), Ok(2));
        let value = vec![0; MAX_VALUE_BYTES];
        let _ = (0..).take_while(|i| state.set(&format!("v{i}"), value.clone(), 0, 0).is_ok()).count();
        assert!(state.clear_if_full());
        assert_eq!(state.add("n", 1, 0, 0), Ok(1));
    }

    #[test]
    fn log_lines_are_limited_over_all_calls() {
        let state = SlotState::default();
        let written = (0..1000).filter(|i| state.may_log(20.0, i / 10)).count();
        assert_eq!(written, 81, "a burst of 80, and one more within the tenth of a second");
    }

    #[test]
    fn keys_and_values_are_bounded() {
        let state = SlotState::default();
        assert_eq!(state.add("", 1, 0, 0), Err(StateError::TooLarge));
        assert_eq!(state.add(&"k".repeat(129), 1, 0, 0), Err(StateError::TooLarge));
        assert_eq!(state.set("k", vec![0; 4097], 0, 0), Err(StateError::TooLarge));
    }

    #[test]
    fn metric_names_are_safe_and_bounded() {
        let state = SlotState::default();
        assert_eq!(state.metric_name("a b\n"), Some("a_b_".to_owned()));
        let made = (0..1000).filter(|i| state.metric_name(&i.to_string()).is_some()).count();
        assert_eq!(made, MAX_METRICS - 1);
    }
}
