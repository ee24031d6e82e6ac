//! Links that a test gives.

use crate::{Candidates, role};

/// What a test says of links; within the sandbox, nothing.
#[derive(Debug, Default)]
pub(crate) struct GivenLinks {
    pub(crate) prefilled_by: Option<u64>,
    reachable: Vec<(Option<u32>, Vec<u32>)>,
    pub(crate) tokens_per_second: Measure,
    pub(crate) handoff_ms: Measure,
    pub(crate) error_rate: Measure,
}

/// A column for each row that KV may come from.
#[derive(Debug, Default)]
pub(crate) struct Measure(Vec<(Option<u32>, Vec<f32>)>);

impl Measure {
    pub(crate) fn column(&self, candidates: &Candidates, from: Option<u32>) -> Vec<f32> {
        last(&self.0, from).unwrap_or_else(|| vec![f32::NAN; candidates.count() as usize])
    }
}

impl GivenLinks {
    /// As given, else from who prefills to whoever else decodes.
    pub(crate) fn reachable(&self, candidates: &Candidates, from: Option<u32>) -> Vec<u32> {
        last(&self.reachable, from).unwrap_or_else(|| {
            let roles = candidates.role();
            let prefills = match from {
                Some(from) => roles.get(from as usize).is_some_and(|&of| of == role::PREFILL || of == role::BOTH),
                None => self.prefilled_by.is_some(),
            };
            let is_itself = |row: usize| match from {
                Some(from) => row == from as usize,
                None => candidates.worker_id().get(row).copied() == self.prefilled_by,
            };
            let reaches = |row: usize| prefills && !is_itself(row) && (roles[row] == role::DECODE || roles[row] == role::BOTH);
            (0..roles.len()).map(|row| u32::from(reaches(row))).collect()
        })
    }
}

/// What was given last of this row.
fn last<T: Clone>(given: &[(Option<u32>, Vec<T>)], from: Option<u32>) -> Option<Vec<T>> {
    given.iter().rfind(|(of, _)| *of == from).map(|(_, column)| column.clone())
}

/// For tests: see [`testing`](crate::testing). `from` is the row of the worker that would prefill, or `None` for the one that
/// does or did, in the stage [`DECODE`](crate::stage::DECODE). A column that is not as long as the candidates panics.
impl Candidates {
    /// Gives the worker that prefills or has prefilled: [`Links::prefilled_by`](crate::Links::prefilled_by).
    #[must_use]
    pub fn with_prefilled_by(mut self, worker: u64) -> Self {
        self.given_links.prefilled_by = Some(worker);
        self
    }

    /// Gives [`Links::reachable`](crate::Links::reachable). Where it is not given, KV can go from who prefills to whoever else
    /// decodes, by their roles.
    #[must_use]
    pub fn with_reachable(mut self, from: impl Into<Option<u32>>, values: impl Into<Vec<u32>>) -> Self {
        let values = self.link_column(values);
        self.given_links.reachable.push((from.into(), values));
        self
    }

    /// Gives [`Links::tokens_per_second`](crate::Links::tokens_per_second).
    #[must_use]
    pub fn with_link_tokens_per_second(mut self, from: impl Into<Option<u32>>, values: impl Into<Vec<f32>>) -> Self {
        let values = self.link_column(values);
        self.given_links.tokens_per_second.0.push((from.into(), values));
        self
    }

    /// Gives [`Links::handoff_ms`](crate::Links::handoff_ms).
    #[must_use]
    pub fn with_link_handoff_ms(mut self, from: impl Into<Option<u32>>, values: impl Into<Vec<f32>>) -> Self {
        let values = self.link_column(values);
        self.given_links.handoff_ms.0.push((from.into(), values));
        self
    }

    /// Gives [`Links::error_rate`](crate::Links::error_rate).
    #[must_use]
    pub fn with_link_error_rate(mut self, from: impl Into<Option<u32>>, values: impl Into<Vec<f32>>) -> Self {
        let values = self.link_column(values);
        self.given_links.error_rate.0.push((from.into(), values));
        self
    }

    fn link_column<T>(&self, values: impl Into<Vec<T>>) -> Vec<T> {
        let values = values.into();
        assert_eq!(values.len(), self.count() as usize, "a column has one value per row");
        values
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kv_goes_from_who_prefills_to_whoever_else_decodes_unless_a_test_says_otherwise() {
        let roles = [role::PREFILL, role::DECODE, role::BOTH, role::AGGREGATED];
        let candidates = Candidates::test(4).with_role(roles);
        let reachable = |from: Option<u32>| candidates.links().reachable(from);
        assert_eq!(reachable(Some(0)), [0, 1, 1, 0]);
        assert_eq!(reachable(Some(2)), [0, 1, 0, 0]);
        assert_eq!(
            (reachable(Some(1)), reachable(Some(3)), reachable(Some(9)), reachable(None)),
            (vec![0; 4], vec![0; 4], vec![0; 4], vec![0; 4])
        );
        let avoided = Candidates::test(4).with_role(roles).with_reachable(0, [0, 0, 1, 0]);
        assert_eq!((avoided.links().reachable(0), avoided.links().reachable(2)), (vec![0, 0, 1, 0], vec![0, 1, 0, 0]));
        let decode = Candidates::test(2).with_role([role::BOTH, role::DECODE]).with_prefilled_by(0);
        assert_eq!((decode.links().prefilled_by(), decode.links().reachable(None)), (Some(0), vec![0, 1]));
    }

    #[test]
    fn what_a_test_does_not_give_of_a_link_is_unknown() {
        let candidates =
            Candidates::test(2).with_link_tokens_per_second(0, [f32::NAN, 5e5]).with_link_error_rate(None, [0.0, 0.5]);
        let links = candidates.links();
        assert_eq!(links.prefilled_by(), None);
        assert_eq!(links.tokens_per_second(0)[1], 5e5);
        assert_eq!(links.error_rate(None), [0.0, 0.5]);
        for unknown in [links.tokens_per_second(1), links.handoff_ms(0), links.error_rate(0)] {
            assert!(unknown.len() == 2 && unknown.iter().all(|value| value.is_nan()), "{unknown:?}");
        }
    }
}
