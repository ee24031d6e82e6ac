//! Candidates that a test gives.

use super::{column, given};
use crate::{Candidates, UNKNOWN};

/// One value per row; `None` where a worker has none.
type Names = Vec<Option<String>>;

/// The columns with an argument that a test gives; within the sandbox, none.
#[derive(Debug, Default)]
pub(crate) struct Given {
    labels: Vec<(String, Names)>,
    topology: Vec<(u32, Names)>,
    signals: Vec<(String, Vec<f32>)>,
}

impl Given {
    pub(crate) fn topology(&self, level: u32) -> Option<Vec<u32>> {
        find(&self.topology, &level).map(codes)
    }

    pub(crate) fn label(&self, key: &str) -> Option<Vec<u32>> {
        find(&self.labels, key).map(codes)
    }

    pub(crate) fn label_code(&self, key: &str, value: &str) -> Option<u32> {
        code(&distinct(find(&self.labels, key)?), value)
    }

    pub(crate) fn signal(&self, name: &str) -> Option<Vec<f32>> {
        find(&self.signals, name).cloned()
    }
}

/// What was given last by this key.
fn find<'a, Q: PartialEq + ?Sized, K: std::borrow::Borrow<Q>, V>(given: &'a [(K, V)], key: &Q) -> Option<&'a V> {
    given.iter().rfind(|(name, _)| name.borrow() == key).map(|(_, value)| value)
}

/// Codes are positions in the sorted list of all values, as the host's are.
fn codes(names: &Names) -> Vec<u32> {
    let distinct = distinct(names);
    names.iter().map(|name| name.as_deref().and_then(|name| code(&distinct, name)).unwrap_or(UNKNOWN)).collect()
}

fn code(distinct: &[&str], value: &str) -> Option<u32> {
    distinct.binary_search(&value).ok().map(|position| position as u32)
}

fn distinct(names: &Names) -> Vec<&str> {
    let mut distinct: Vec<&str> = names.iter().flatten().map(String::as_str).collect();
    distinct.sort_unstable();
    distinct.dedup();
    distinct
}

/// # Panics
/// If there is not one value per row.
fn names<'a>(count: u32, values: impl IntoIterator<Item = impl Into<Option<&'a str>>>) -> Names {
    let names: Names = values.into_iter().map(|value| value.into().map(str::to_owned)).collect();
    assert_eq!(names.len(), count as usize, "a column has one value per row");
    names
}

/// For tests: see [`testing`](crate::testing). A column that is not as long as the candidates panics.
impl Candidates {
    /// Candidates for a test: healthy workers of one pool with worker ids 0, 1, 2, …, each its own engine. What else no
    /// `with_` gives is unknown.
    ///
    /// # Panics
    /// If `count` is 0: without candidates a policy is not asked.
    #[must_use]
    pub fn test(count: u32) -> Self {
        assert!(count > 0, "there is at least one candidate");
        let ids: Vec<u64> = (0..count.into()).collect();
        Self { count: given(count), worker_id: given(ids.clone()), engine_key: given(ids), ..Self::default() }
    }

    /// Gives [`worker_id`](Self::worker_id).
    #[must_use]
    pub fn with_worker_id(self, values: impl Into<Vec<u64>>) -> Self {
        Self { worker_id: column(self.count(), values), ..self }
    }

    /// Gives [`engine_key`](Self::engine_key).
    #[must_use]
    pub fn with_engine_key(self, values: impl Into<Vec<u64>>) -> Self {
        Self { engine_key: column(self.count(), values), ..self }
    }

    /// Gives [`dp_rank`](Self::dp_rank).
    #[must_use]
    pub fn with_dp_rank(self, values: impl Into<Vec<u32>>) -> Self {
        Self { dp_rank: column(self.count(), values), ..self }
    }

    /// Gives [`pool_key`](Self::pool_key).
    #[must_use]
    pub fn with_pool_key(self, values: impl Into<Vec<u64>>) -> Self {
        Self { pool_key: column(self.count(), values), ..self }
    }

    /// Gives [`role`](Self::role).
    #[must_use]
    pub fn with_role(self, values: impl Into<Vec<u32>>) -> Self {
        Self { role: column(self.count(), values), ..self }
    }

    /// Gives [`state`](Self::state).
    #[must_use]
    pub fn with_state(self, values: impl Into<Vec<u32>>) -> Self {
        Self { state: column(self.count(), values), ..self }
    }

    /// Gives [`block_size`](Self::block_size).
    #[must_use]
    pub fn with_block_size(self, values: impl Into<Vec<u32>>) -> Self {
        Self { block_size: column(self.count(), values), ..self }
    }

    /// Gives [`cached_device_tokens`](Self::cached_device_tokens).
    #[must_use]
    pub fn with_cached_device_tokens(self, values: impl Into<Vec<u32>>) -> Self {
        Self { cached_device_tokens: column(self.count(), values), ..self }
    }

    /// Gives [`cached_host_tokens`](Self::cached_host_tokens).
    #[must_use]
    pub fn with_cached_host_tokens(self, values: impl Into<Vec<u32>>) -> Self {
        Self { cached_host_tokens: column(self.count(), values), ..self }
    }

    /// Gives [`cached_disk_tokens`](Self::cached_disk_tokens).
    #[must_use]
    pub fn with_cached_disk_tokens(self, values: impl Into<Vec<u32>>) -> Self {
        Self { cached_disk_tokens: column(self.count(), values), ..self }
    }

    /// Gives [`cached_remote_tokens`](Self::cached_remote_tokens).
    #[must_use]
    pub fn with_cached_remote_tokens(self, values: impl Into<Vec<u32>>) -> Self {
        Self { cached_remote_tokens: column(self.count(), values), ..self }
    }

    /// Gives [`active_prefill_tokens`](Self::active_prefill_tokens).
    #[must_use]
    pub fn with_active_prefill_tokens(self, values: impl Into<Vec<u32>>) -> Self {
        Self { active_prefill_tokens: column(self.count(), values), ..self }
    }

    /// Gives [`active_uncached_tokens`](Self::active_uncached_tokens).
    #[must_use]
    pub fn with_active_uncached_tokens(self, values: impl Into<Vec<u32>>) -> Self {
        Self { active_uncached_tokens: column(self.count(), values), ..self }
    }

    /// Gives [`prefill_busy_ms`](Self::prefill_busy_ms).
    #[must_use]
    pub fn with_prefill_busy_ms(self, values: impl Into<Vec<u32>>) -> Self {
        Self { prefill_busy_ms: column(self.count(), values), ..self }
    }

    /// Gives [`active_decode_tokens`](Self::active_decode_tokens).
    #[must_use]
    pub fn with_active_decode_tokens(self, values: impl Into<Vec<u32>>) -> Self {
        Self { active_decode_tokens: column(self.count(), values), ..self }
    }

    /// Gives [`active_requests`](Self::active_requests).
    #[must_use]
    pub fn with_active_requests(self, values: impl Into<Vec<u32>>) -> Self {
        Self { active_requests: column(self.count(), values), ..self }
    }

    /// Gives [`queued_requests`](Self::queued_requests).
    #[must_use]
    pub fn with_queued_requests(self, values: impl Into<Vec<u32>>) -> Self {
        Self { queued_requests: column(self.count(), values), ..self }
    }

    /// Gives [`max_running_requests`](Self::max_running_requests).
    #[must_use]
    pub fn with_max_running_requests(self, values: impl Into<Vec<u32>>) -> Self {
        Self { max_running_requests: column(self.count(), values), ..self }
    }

    /// Gives [`max_batched_tokens`](Self::max_batched_tokens).
    #[must_use]
    pub fn with_max_batched_tokens(self, values: impl Into<Vec<u32>>) -> Self {
        Self { max_batched_tokens: column(self.count(), values), ..self }
    }

    /// Gives [`kv_tokens_total`](Self::kv_tokens_total).
    #[must_use]
    pub fn with_kv_tokens_total(self, values: impl Into<Vec<u32>>) -> Self {
        Self { kv_tokens_total: column(self.count(), values), ..self }
    }

    /// Gives [`kv_tokens_free`](Self::kv_tokens_free).
    #[must_use]
    pub fn with_kv_tokens_free(self, values: impl Into<Vec<u32>>) -> Self {
        Self { kv_tokens_free: column(self.count(), values), ..self }
    }

    /// Gives [`load_age_ms`](Self::load_age_ms).
    #[must_use]
    pub fn with_load_age_ms(self, values: impl Into<Vec<u32>>) -> Self {
        Self { load_age_ms: column(self.count(), values), ..self }
    }

    /// Gives [`recent_ttft_ms`](Self::recent_ttft_ms).
    #[must_use]
    pub fn with_recent_ttft_ms(self, values: impl Into<Vec<f32>>) -> Self {
        Self { recent_ttft_ms: column(self.count(), values), ..self }
    }

    /// Gives [`recent_itl_ms`](Self::recent_itl_ms).
    #[must_use]
    pub fn with_recent_itl_ms(self, values: impl Into<Vec<f32>>) -> Self {
        Self { recent_itl_ms: column(self.count(), values), ..self }
    }

    /// Gives [`recent_tokens_per_second`](Self::recent_tokens_per_second).
    #[must_use]
    pub fn with_recent_tokens_per_second(self, values: impl Into<Vec<f32>>) -> Self {
        Self { recent_tokens_per_second: column(self.count(), values), ..self }
    }

    /// Gives [`error_rate`](Self::error_rate).
    #[must_use]
    pub fn with_error_rate(self, values: impl Into<Vec<f32>>) -> Self {
        Self { error_rate: column(self.count(), values), ..self }
    }

    /// Gives [`recent_age_ms`](Self::recent_age_ms).
    #[must_use]
    pub fn with_recent_age_ms(self, values: impl Into<Vec<u32>>) -> Self {
        Self { recent_age_ms: column(self.count(), values), ..self }
    }

    /// Gives [`up_seconds`](Self::up_seconds).
    #[must_use]
    pub fn with_up_seconds(self, values: impl Into<Vec<u32>>) -> Self {
        Self { up_seconds: column(self.count(), values), ..self }
    }

    /// Gives [`adapter_loaded`](Self::adapter_loaded).
    #[must_use]
    pub fn with_adapter_loaded(self, values: impl Into<Vec<u32>>) -> Self {
        Self { adapter_loaded: column(self.count(), values), ..self }
    }

    /// Gives [`preference`](Self::preference).
    #[must_use]
    pub fn with_preference(self, values: impl Into<Vec<f32>>) -> Self {
        Self { preference: column(self.count(), values), ..self }
    }

    /// Gives a level of [`topology`](Self::topology) by the names of its domains, or `None` where it is unknown.
    #[must_use]
    pub fn with_topology<'a>(mut self, level: u32, domains: impl IntoIterator<Item = impl Into<Option<&'a str>>>) -> Self {
        let domains = names(self.count(), domains);
        self.given.topology.push((level, domains));
        self
    }

    /// Gives a [`label`](Self::label) by its values, or `None` where a worker has no such label.
    #[must_use]
    pub fn with_label<'a>(mut self, key: &str, values: impl IntoIterator<Item = impl Into<Option<&'a str>>>) -> Self {
        let values = names(self.count(), values);
        self.given.labels.push((key.to_owned(), values));
        self
    }

    /// Gives a [`signal`](Self::signal).
    #[must_use]
    pub fn with_signal(mut self, name: &str, values: impl Into<Vec<f32>>) -> Self {
        let values = values.into();
        assert_eq!(values.len(), self.count() as usize, "a column has one value per row");
        self.given.signals.push((name.to_owned(), values));
        self
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::topology;

    #[test]
    fn what_a_test_does_not_give_is_unknown() {
        let candidates = Candidates::test(2);
        assert_eq!(candidates.worker_id(), [0, 1]);
        assert_eq!(candidates.engine_key(), [0, 1]);
        assert_eq!(candidates.pool_key(), [0, 0]);
        assert_eq!(candidates.recent_age_ms(), [UNKNOWN; 2]);
        assert_eq!(candidates.label("gpu"), [UNKNOWN; 2]);
        assert_eq!(candidates.topology(topology::RACK), [UNKNOWN; 2]);
        assert_eq!((candidates.label_code("gpu", "h100"), candidates.signal("price")), (None, None));
    }

    #[test]
    fn codes_are_positions_in_the_sorted_values() {
        let candidates = Candidates::test(4)
            .with_label("gpu", [Some("h200"), None, Some("a100"), Some("h200")])
            .with_topology(topology::ZONE, ["b", "a", "b", "c"]);
        assert_eq!(candidates.label("gpu"), [1, UNKNOWN, 0, 1]);
        assert_eq!((candidates.label_code("gpu", "h200"), candidates.label_code("gpu", "b200")), (Some(1), None));
        assert_eq!(candidates.topology(topology::ZONE), [1, 0, 1, 2]);
    }

    #[test]
    fn what_is_given_last_counts() {
        let candidates = Candidates::test(1).with_signal("price", [1.0]).with_signal("price", [2.0]);
        assert_eq!(candidates.signal("price"), Some(vec![2.0]));
    }

    #[test]
    #[should_panic(expected = "one value per row")]
    fn a_column_of_the_wrong_length_is_refused() {
        let _ = Candidates::test(2).with_active_requests([1]);
    }
}
