//! Composed: weighted scorers and a picker, by settings alone.
//!
//! All of it is the SDK's library, [`dynamo_policy_sdk::compose`]: each scorer judges the candidates by one thing from 0 to
//! 1, weights say how much each matters, and the picker takes the best, draws by chance, or takes any of the best few. What
//! is unknown of a worker counts as the average of the others; a scorer of which nothing is known is left out.
//!
//! ```json
//! {"weights": {"cached_prefix": 3, "active_prefill": 1}, "picker": {"softmax": {"temperature": 0.05}},
//!  "labels": [{"key": "gpu", "value": "h200", "weight": 0.5}]}
//! ```
//!
//! To use scorers of your own, copy this crate and add them to the composition.

use dynamo_policy_sdk::{
    Candidates, Decision, Request, Router,
    compose::{Composition, Settings},
};

/// The policy.
pub struct Composed {
    composition: Composition,
}

impl Router for Composed {
    type Settings = Settings;

    fn new(settings: Settings) -> Result<Self, String> {
        Ok(Self { composition: settings.compose()? })
    }

    fn route(&self, request: &Request, candidates: &Candidates) -> Decision {
        self.composition.route(request, candidates)
    }
}

dynamo_policy_sdk::register!(Composed);

#[cfg(test)]
mod tests {
    use super::*;
    use dynamo_policy_sdk::compose::{LabelWeight, Picker, Weights};

    /// Only what a test names has a weight.
    fn nothing() -> Weights {
        Weights {
            active_prefill: 0.0,
            active_decode: 0.0,
            active_requests: 0.0,
            queue: 0.0,
            kv_free: 0.0,
            cached_prefix: 0.0,
            error_rate: 0.0,
            adapter: 0.0,
            ..Weights::default()
        }
    }

    fn busy() -> Candidates {
        Candidates::test(3)
            .with_active_prefill_tokens([1000, 0, 4000])
            .with_active_decode_tokens([0, 0, 0])
            .with_active_requests([1, 0, 1])
    }

    fn route(settings: Settings, candidates: &Candidates) -> Decision {
        Composed::new(settings).unwrap().route(&Request::test().with_prompt_tokens(4000), candidates)
    }

    #[test]
    fn without_settings_the_least_work_is_first() {
        assert_eq!(route(Settings::default(), &busy()), Decision::Place(vec![1, 0, 2]));
    }

    #[test]
    fn a_cached_prompt_outweighs_some_load_and_more_so_by_its_weight() {
        let cached = busy().with_cached_device_tokens([3500, 0, 0]);
        assert_eq!(route(Settings::default(), &cached), Decision::Place(vec![0, 1, 2]));
        let less = Settings { weights: Weights { cached_prefix: 0.1, ..Weights::default() }, ..Settings::default() };
        assert_eq!(route(less, &cached), Decision::Place(vec![1, 0, 2]));
    }

    #[test]
    fn a_worker_that_fails_is_avoided() {
        let failing = busy().with_error_rate([0.0, 1.0, 0.0]);
        let weights = Weights { error_rate: 5.0, ..Weights::default() };
        assert_eq!(route(Settings { weights, ..Settings::default() }, &failing), Decision::Place(vec![0, 2, 1]));
    }

    #[test]
    fn a_label_draws_requests() {
        let labels = vec![LabelWeight { key: "gpu".to_owned(), value: "h200".to_owned(), weight: 1.0 }];
        let settings = Settings { weights: nothing(), labels, ..Settings::default() };
        let labelled = busy().with_label("gpu", ["a100", "a100", "h200"]);
        let Decision::Place(rows) = route(settings, &labelled) else { panic!("not placed") };
        assert_eq!(rows[0], 2);
    }

    #[test]
    fn a_softmax_spreads_more_than_the_best_does() {
        let settings = Settings { picker: Picker::Softmax { temperature: 1.0 }, ..Settings::default() };
        let firsts: Vec<u32> = (0..200)
            .map(|_| match route(settings.clone(), &busy()) {
                Decision::Place(rows) => rows[0],
                other => panic!("not placed: {other:?}"),
            })
            .collect();
        assert!([0, 1, 2].iter().all(|row| firsts.contains(row)), "{firsts:?}");
    }

    #[test]
    fn a_wrong_weight_is_refused_by_name() {
        let weights = Weights { queue: f32::NAN, ..Weights::default() };
        let error = Composed::new(Settings { weights, ..Settings::default() }).err().unwrap();
        assert_eq!(error, "weights.queue is NaN; use a number of at least 0");
    }
}
