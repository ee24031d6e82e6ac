//! Policies from parts: scorers that each judge all candidates by one thing, weights, and a picker.
//!
//! ```
//! use dynamo_policy_sdk::{
//!     Candidates, Decision, NoSettings, Request, Router,
//!     compose::{Composition, Picker, Scorer, scorers},
//! };
//!
//! /// Your own, beside those of the library: even rows are nicer.
//! struct Even;
//!
//! impl Scorer for Even {
//!     fn name(&self) -> &str {
//!         "even"
//!     }
//!
//!     fn score(&self, _: &Request, _: &Candidates, scores: &mut [f32]) {
//!         for (row, score) in scores.iter_mut().enumerate() {
//!             *score = if row % 2 == 0 { 1.0 } else { 0.0 };
//!         }
//!     }
//! }
//!
//! struct Policy(Composition);
//!
//! impl Router for Policy {
//!     type Settings = NoSettings;
//!
//!     fn new(_: NoSettings) -> Result<Self, String> {
//!         Ok(Self(Composition::new(Picker::Best).with(2.0, scorers::ActivePrefill).with(0.5, Even)))
//!     }
//!
//!     fn route(&self, request: &Request, candidates: &Candidates) -> Decision {
//!         self.0.route(request, candidates)
//!     }
//! }
//!
//! let candidates = Candidates::test(2).with_active_prefill_tokens([100, 0]);
//! let policy = Policy::new(NoSettings {}).unwrap();
//! assert_eq!(policy.route(&Request::test(), &candidates), Decision::Place(vec![1, 0]));
//! ```
//!
//! Contract: a score is from 0 (worst) to 1 (best), so that weights say how much each matters, whatever it counts in;
//! NaN is "unknown", and negative infinity "only if nothing else is left". A candidate's total is the weighted mean of
//! its scores, again from 0 to 1.
//!
//! **Unknown is not zero.** A candidate of which a scorer knows nothing counts as the average of those that it knows: it is
//! neither shunned, which would keep it unknown, nor flooded. A scorer that knows nothing of anybody is left out.
//!
//! Only what is linked is imported: a composition that does not use a scorer does not read its columns.

mod picker;
pub mod scorers;
mod settings;
#[cfg(test)]
mod tests;

use crate::{Candidates, Decision, Request, explain};

pub use picker::Picker;
pub use settings::{LabelWeight, Preferred, Settings, SignalWeight, Weights};

/// Judges all candidates by one thing.
pub trait Scorer {
    /// Name of the term in explanations.
    fn name(&self) -> &str;

    /// Writes the score of each row: 0 worst, 1 best, NaN unknown, negative infinity to be avoided. `scores` has one value
    /// per row, and all are NaN before.
    fn score(&self, request: &Request, candidates: &Candidates, scores: &mut [f32]);
}

/// Scorers with their weights, and how to pick by the totals.
pub struct Composition {
    terms: Vec<(f32, Box<dyn Scorer>)>,
    picker: Picker,
}

impl Composition {
    /// Without scorers every candidate is as good as any other.
    #[must_use]
    pub fn new(picker: Picker) -> Self {
        Self { terms: Vec::new(), picker }
    }

    /// Adds a scorer. One of weight 0 is left out: its columns are never asked for.
    ///
    /// # Panics
    /// If the weight is negative or not finite: check what comes from settings before.
    #[must_use]
    pub fn with(mut self, weight: f32, scorer: impl Scorer + 'static) -> Self {
        assert!(weight.is_finite() && weight >= 0.0, "the weight of {} is {weight}", scorer.name());
        if weight > 0.0 {
            self.terms.push((weight, Box::new(scorer)));
        }
        self
    }

    /// Decides: scores, weighs, picks.
    pub fn route(&self, request: &Request, candidates: &Candidates) -> Decision {
        Decision::Place(self.picker.pick(&self.totals(request, candidates)))
    }

    /// The weighted mean of the scores of each row, from 0 to 1, or negative infinity.
    pub fn totals(&self, request: &Request, candidates: &Candidates) -> Vec<f32> {
        let count = candidates.count() as usize;
        let mut totals = vec![0.0; count];
        let mut weights = 0.0;
        let mut scores = vec![0.0; count];
        for (weight, scorer) in &self.terms {
            scores.fill(f32::NAN);
            scorer.score(request, candidates, &mut scores);
            explain(scorer.name(), || scores.clone());
            let Some(average) = average(&scores) else { continue };
            weights += weight;
            for (total, &score) in totals.iter_mut().zip(&scores) {
                *total += weight * if score.is_nan() { average } else { score };
            }
        }
        if weights > 0.0 {
            let share = 1.0 / weights;
            totals.iter_mut().for_each(|total| *total *= share);
        }
        explain("total", || totals.clone());
        totals
    }
}

/// The mean of the finite scores; `None` if nothing is known.
fn average(scores: &[f32]) -> Option<f32> {
    // In parts of 2^14, since sums of integers become SIMD and those of floats must not. The cast makes 0 of NaN and
    // negative infinity.
    const PARTS: f32 = (1u32 << 14) as f32;
    let (sum, count) = scores.iter().fold((0u32, 0u32), |(sum, count), score| {
        (sum.wrapping_add((score * PARTS) as u32), count + u32::from(score.abs() < f32::INFINITY))
    });
    if count > 0 {
        return Some(sum as f32 / PARTS / count as f32);
    }
    // Nothing but infinities still says whom to avoid; an unknown one is then better than those.
    scores.contains(&f32::NEG_INFINITY).then_some(0.0)
}
