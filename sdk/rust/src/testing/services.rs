//! Stand-ins for what the host offers, per thread, and how a test drives them.

use std::{
    cell::{Cell, RefCell},
    collections::BTreeMap,
    time::Duration,
};

use crate::{state::StateError, telemetry::Level};

const MAX_KEY_BYTES: usize = 128;
const MAX_VALUE_BYTES: usize = 4096;

enum Value {
    Bytes(Vec<u8>),
    Counter(i64),
    Bucket { level: f64, at_ms: u64 },
}

struct Entry {
    value: Value,
    /// `u64::MAX`: never.
    expires_ms: u64,
}

#[derive(Default)]
struct Said {
    log: Vec<(Level, String)>,
    counters: BTreeMap<String, u64>,
    gauges: BTreeMap<String, f64>,
    explanations: Vec<(String, Vec<f32>)>,
}

thread_local! {
    static NOW_MS: Cell<u64> = const { Cell::new(0) };
    static RANDOM: Cell<u64> = const { Cell::new(0) };
    static STATE: RefCell<BTreeMap<String, Entry>> = const { RefCell::new(BTreeMap::new()) };
    static STATE_ERROR: Cell<Option<StateError>> = const { Cell::new(None) };
    static SAID: RefCell<Said> = RefCell::default();
    static EXPLAIN_WANTED: Cell<bool> = const { Cell::new(false) };
}

/// Sets both clocks. They begin at 0.
pub fn set_now_ms(now_ms: u64) {
    NOW_MS.set(now_ms);
}

/// Lets time pass, in whole milliseconds.
pub fn advance(by: Duration) {
    NOW_MS.set(NOW_MS.get() + by.as_millis() as u64);
}

/// Begins randomness anew, from this seed. Without it every thread begins from the same one, so that a test decides the
/// same in every run.
pub fn seed(seed: u64) {
    RANDOM.set(seed);
}

/// Forgets all entries of state, as a restart of the host would.
pub fn clear_state() {
    STATE.take();
}

/// Refuses every write to state with this error until it is set to `None`: what does the policy do without?
pub fn set_state_error(error: Option<StateError>) {
    STATE_ERROR.set(error);
}

/// Whether the reasons of decisions are recorded, for [`explanations`]. They are not at first.
pub fn set_explain_wanted(wanted: bool) {
    EXPLAIN_WANTED.set(wanted);
}

/// The terms that [`explain`](crate::explain) recorded, in order.
#[must_use]
pub fn explanations() -> Vec<(String, Vec<f32>)> {
    SAID.with_borrow(|said| said.explanations.clone())
}

/// The lines that were logged, in order.
#[must_use]
pub fn log_lines() -> Vec<(Level, String)> {
    SAID.with_borrow(|said| said.log.clone())
}

/// The sum of what was added to a counter metric.
#[must_use]
pub fn counter(name: &str) -> u64 {
    SAID.with_borrow(|said| said.counters.get(name).copied().unwrap_or(0))
}

/// What a gauge metric was last set to.
#[must_use]
pub fn gauge(name: &str) -> Option<f64> {
    SAID.with_borrow(|said| said.gauges.get(name).copied())
}

/// Everything as in a thread that has just begun: time, randomness, state, telemetry and explanations.
pub fn reset() {
    set_now_ms(0);
    seed(0);
    clear_state();
    set_state_error(None);
    set_explain_wanted(false);
    SAID.take();
}

pub(crate) fn now_ms() -> u64 {
    NOW_MS.get()
}

/// splitmix64 (Steele et al. 2014).
pub(crate) fn next_random() -> u64 {
    let state = RANDOM.get().wrapping_add(0x9e37_79b9_7f4a_7c15);
    RANDOM.set(state);
    let x = (state ^ (state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

pub(crate) fn log(level: Level, message: &str) {
    SAID.with_borrow_mut(|said| said.log.push((level, message.to_owned())));
}

pub(crate) fn counter_add(name: &str, by: u64) {
    SAID.with_borrow_mut(|said| *said.counters.entry(name.to_owned()).or_default() += by);
}

pub(crate) fn gauge_set(name: &str, value: f64) {
    SAID.with_borrow_mut(|said| said.gauges.insert(name.to_owned(), value));
}

pub(crate) fn explain_wanted() -> bool {
    EXPLAIN_WANTED.get()
}

pub(crate) fn explain(term: &str, values: Vec<f32>) {
    SAID.with_borrow_mut(|said| said.explanations.push((term.to_owned(), values)));
}

pub(crate) fn get(key: &str) -> Option<Vec<u8>> {
    STATE.with_borrow(|entries| match entries.get(key)? {
        Entry { value: Value::Bytes(bytes), expires_ms } if *expires_ms > now_ms() => Some(bytes.clone()),
        _ => None,
    })
}

pub(crate) fn set(key: &str, value: &[u8], ttl_ms: u32) -> Result<(), StateError> {
    if value.len() > MAX_VALUE_BYTES {
        return Err(StateError::TOO_LARGE);
    }
    with_entry(
        key,
        || Value::Bytes(Vec::new()),
        |entry| {
            let Value::Bytes(bytes) = &mut entry.value else { return Err(StateError::WRONG_KIND) };
            value.clone_into(bytes);
            entry.expires_ms = expiry(ttl_ms);
            Ok(())
        },
    )
}

pub(crate) fn add(key: &str, delta: i64, ttl_ms: u32) -> Result<i64, StateError> {
    with_entry(
        key,
        || Value::Counter(0),
        |entry| {
            let Value::Counter(counter) = &mut entry.value else { return Err(StateError::WRONG_KIND) };
            *counter = counter.wrapping_add(delta);
            entry.expires_ms = expiry(ttl_ms);
            Ok(*counter)
        },
    )
}

/// As in the contract: what remains, or milliseconds until the amount is there. A negative amount gives back.
pub(crate) fn take(key: &str, amount: f64, per_second: f64, burst: f64) -> Result<Result<f64, u32>, StateError> {
    let is_sane = amount.is_finite() && [per_second, burst].iter().all(|value| value.is_finite() && *value >= 0.0);
    if !is_sane || amount > burst {
        return Ok(Err(u32::MAX));
    }
    with_entry(
        key,
        || Value::Bucket { level: burst, at_ms: now_ms() },
        |entry| {
            let Value::Bucket { level, at_ms } = &mut entry.value else { return Err(StateError::WRONG_KIND) };
            let elapsed_s = now_ms().saturating_sub(*at_ms) as f64 / 1000.0;
            *level = (*level + elapsed_s * per_second).min(burst);
            *at_ms = now_ms();
            if *level >= amount {
                *level = (*level - amount).min(burst);
                return Ok(Ok(*level));
            }
            // The cast saturates: a refill of nothing is "never".
            Ok(Err(((amount - *level) / per_second * 1000.0).ceil() as u32))
        },
    )
}

fn expiry(ttl_ms: u32) -> u64 {
    if ttl_ms == 0 { u64::MAX } else { now_ms() + u64::from(ttl_ms) }
}

/// The entry of `key`, made if there is none or an expired one. There is no quota.
fn with_entry<R>(
    key: &str,
    make: impl FnOnce() -> Value,
    work: impl FnOnce(&mut Entry) -> Result<R, StateError>,
) -> Result<R, StateError> {
    if let Some(error) = STATE_ERROR.get() {
        return Err(error);
    }
    if key.is_empty() || key.len() > MAX_KEY_BYTES {
        return Err(StateError::TOO_LARGE);
    }
    STATE.with_borrow_mut(|entries| {
        if entries.get(key).is_some_and(|entry| entry.expires_ms <= now_ms()) {
            entries.remove(key);
        }
        work(entries.entry(key.to_owned()).or_insert_with(|| Entry { value: make(), expires_ms: u64::MAX }))
    })
}

#[cfg(test)]
mod tests {
    use crate::{
        clock, entropy, explain,
        state::{self, StateError, Taken},
        telemetry, testing,
    };
    use std::time::Duration;

    #[test]
    fn an_entry_lives_as_long_as_its_ttl() {
        testing::reset();
        state::set("bytes", &[1], Duration::from_micros(1)).unwrap();
        state::set("for good", &[2], Duration::ZERO).unwrap();
        assert_eq!(state::add("count", 2, Duration::from_secs(1)), Ok(2));
        testing::advance(Duration::from_millis(1));
        assert_eq!(state::get("bytes"), None, "a time to live is rounded up, never down to for ever");
        assert_eq!(state::add("count", 3, Duration::from_secs(1)), Ok(5));
        testing::advance(Duration::from_secs(1));
        assert_eq!(state::add("count", 1, Duration::from_secs(1)), Ok(1));
        assert_eq!(state::get("for good"), Some(vec![2]));
    }

    #[test]
    fn an_entry_is_of_one_kind_and_of_bounded_size() {
        testing::reset();
        state::set("bytes", &[0; 4096], Duration::ZERO).unwrap();
        assert_eq!(state::add("bytes", 1, Duration::ZERO), Err(StateError::WRONG_KIND));
        assert_eq!(state::take("bytes", 1.0, 1.0, 1.0), Err(StateError::WRONG_KIND));
        assert_eq!(state::set("bytes", &[0; 4097], Duration::ZERO), Err(StateError::TOO_LARGE));
        assert_eq!(state::add(&"k".repeat(129), 1, Duration::ZERO), Err(StateError::TOO_LARGE));
        assert_eq!(state::add("", 1, Duration::ZERO), Err(StateError::TOO_LARGE));
    }

    #[test]
    fn a_bucket_refills_with_time() {
        testing::reset();
        assert_eq!(state::take("b", 8.0, 2.0, 10.0), Ok(Taken::Remaining(2.0)));
        assert_eq!(state::take("b", 3.0, 2.0, 10.0), Ok(Taken::RetryAfter(Duration::from_millis(500))));
        testing::advance(Duration::from_millis(500));
        assert_eq!(state::take("b", 3.0, 2.0, 10.0), Ok(Taken::Remaining(0.0)));
        assert_eq!(state::take("b", 3.0, 0.0, 10.0), Ok(Taken::Never));
        state::give_back("b", 4.0, 0.0, 10.0).unwrap();
        assert_eq!(state::take("b", 3.0, 0.0, 10.0), Ok(Taken::Remaining(1.0)));
        assert_eq!(state::take("b", 11.0, 2.0, 10.0), Ok(Taken::Never));
    }

    #[test]
    fn a_reset_leaves_nothing_behind() {
        testing::reset();
        let first = entropy::next();
        testing::set_now_ms(9);
        state::set("k", &[1], Duration::ZERO).unwrap();
        telemetry::counter_add("seen", 2);
        testing::set_state_error(Some(StateError::QUOTA));
        assert_eq!(state::add("n", 1, Duration::ZERO), Err(StateError::QUOTA));
        testing::reset();
        assert_eq!((entropy::next(), clock::unix_ms(), state::get("k"), testing::counter("seen")), (first, 0, None, 0));
        assert_eq!(state::add("n", 1, Duration::ZERO), Ok(1));
    }

    #[test]
    fn what_a_policy_says_can_be_read() {
        testing::reset();
        telemetry::log(telemetry::Level::Warn, "odd");
        telemetry::counter_add("seen", 2);
        telemetry::counter_add("seen", 1);
        telemetry::gauge_set("level", 0.5);
        assert_eq!(testing::log_lines(), [(telemetry::Level::Warn, "odd".to_owned())]);
        assert_eq!((testing::counter("seen"), testing::gauge("level"), testing::gauge("other")), (3, Some(0.5), None));

        explain("cost", || unreachable!("nobody wants it"));
        testing::set_explain_wanted(true);
        explain("cost", || vec![1.0]);
        assert_eq!(testing::explanations(), [("cost".to_owned(), vec![1.0])]);
    }
}
