use proptest::prelude::*;

use super::*;
use crate::{UNKNOWN, testing};

fn scores(scorer: &impl Scorer, request: &Request, candidates: &Candidates) -> Vec<f32> {
    let mut scores = vec![f32::NAN; candidates.count() as usize];
    scorer.score(request, candidates, &mut scores);
    scores
}

fn of(scorer: &impl Scorer, candidates: &Candidates) -> Vec<f32> {
    scores(scorer, &Request::test(), candidates)
}

/// Equal, NaN included.
#[track_caller]
fn same(found: &[f32], expected: &[f32]) {
    let is_same = |(a, b): (&f32, &f32)| a == b || (a.is_nan() && b.is_nan());
    assert!(found.len() == expected.len() && found.iter().zip(expected).all(is_same), "{found:?}, expected {expected:?}");
}

const NAN: f32 = f32::NAN;

#[test]
fn a_load_scores_by_its_part_of_the_largest() {
    let candidates = Candidates::test(4).with_active_prefill_tokens([0, 50, 100, UNKNOWN]);
    same(&of(&scorers::ActivePrefill, &candidates), &[1.0, 0.5, 0.0, NAN]);
    same(&of(&scorers::ActiveRequests, &Candidates::test(2).with_active_requests([0, 0])), &[1.0, 1.0]);
    same(&of(&scorers::Queue, &Candidates::test(2)), &[NAN, NAN]);
}

#[test]
fn a_time_scores_by_the_least() {
    let candidates = Candidates::test(4).with_recent_ttft_ms([10.0, 20.0, NAN, 0.0]);
    same(&of(&scorers::RecentTtft, &candidates), &[1.0, 0.5, NAN, NAN]);
    same(&of(&scorers::RecentTtft, &Candidates::test(3).with_recent_ttft_ms([NAN, -1.0, f32::INFINITY])), &[NAN; 3]);
    same(&of(&scorers::Preference, &Candidates::test(2).with_preference([2.0, 0.5])), &[0.25, 1.0]);
}

#[test]
fn shares_score_as_they_are() {
    let kv = Candidates::test(4).with_kv_tokens_free([25, 200, 5, UNKNOWN]).with_kv_tokens_total([100, 100, 0, 100]);
    same(&of(&scorers::KvFree, &kv), &[0.25, 1.0, NAN, NAN]);
    same(&of(&scorers::ErrorRate, &Candidates::test(2).with_error_rate([0.25, NAN])), &[0.75, NAN]);
}

#[test]
fn the_cached_part_of_the_prompt_counts_by_how_near_it_is() {
    let scorer = scorers::CachedPrefix { host: 0.5, disk: 0.25, remote: 0.25 };
    let candidates = Candidates::test(4)
        .with_cached_device_tokens([50, 0, 400, UNKNOWN])
        .with_cached_host_tokens([0, 100, 0, 100])
        .with_cached_disk_tokens([UNKNOWN; 4]);
    same(&scores(&scorer, &Request::test().with_prompt_tokens(100), &candidates), &[0.5, 0.5, 1.0, NAN]);
    same(&scores(&scorer, &Request::test(), &candidates), &[NAN; 4]);
}

#[test]
fn a_label_that_nobody_has_says_nothing() {
    let candidates = Candidates::test(3).with_label("gpu", [Some("h200"), Some("a100"), None]);
    let label = |value: &str| scorers::LabelMatch { key: "gpu".to_owned(), value: value.to_owned() };
    same(&of(&label("h200"), &candidates), &[1.0, 0.0, 0.0]);
    same(&of(&label("b300"), &candidates), &[NAN; 3]);
}

#[test]
fn a_signal_scores_between_its_ends() {
    let candidates = Candidates::test(4).with_signal("price", [2.0, -2.0, 0.0, NAN]);
    let signal = |more_is_better| scorers::Signal { name: "price".to_owned(), more_is_better };
    same(&of(&signal(false), &candidates), &[0.0, 1.0, 0.5, NAN]);
    same(&of(&signal(true), &candidates), &[1.0, 0.0, 0.5, NAN]);
    same(&of(&signal(true), &Candidates::test(2).with_signal("price", [7.0, 7.0])), &[1.0, 1.0]);
    same(&of(&signal(true), &Candidates::test(2)), &[NAN; 2]);
}

#[test]
fn an_adapter_counts_for_requests_that_name_one() {
    let candidates = Candidates::test(3).with_adapter_loaded([1, 0, UNKNOWN]);
    same(&scores(&scorers::Adapter, &Request::test().with_adapter("a"), &candidates), &[1.0, 0.0, NAN]);
    same(&of(&scorers::Adapter, &candidates), &[NAN; 3]);
}

#[test]
fn a_session_goes_where_it_was_or_where_its_key_belongs() {
    let candidates = Candidates::test(4);
    let session = Request::test().with_session_key(7);
    let home = scorers::home(7, &candidates).unwrap();
    let at_home: Vec<f32> = (0..4).map(|worker| f32::from(u8::from(worker == home))).collect();
    same(&scores(&scorers::SessionAffinity, &session, &candidates), &at_home);
    let last = Request::test().with_session_key(7).with_affinity_worker(2);
    same(&scores(&scorers::SessionAffinity, &last, &candidates), &[0.0, 0.0, 1.0, 0.0]);
    let gone = Request::test().with_session_key(7).with_affinity_worker(99);
    same(&scores(&scorers::SessionAffinity, &gone, &candidates), &at_home);
    same(&scores(&scorers::SessionAffinity, &Request::test(), &candidates), &[NAN; 4]);
}

#[test]
fn the_unknown_count_as_the_average_of_the_known() {
    let composition = Composition::new(Picker::Best).with(1.0, scorers::ActiveRequests).with(3.0, scorers::ErrorRate);
    let candidates = Candidates::test(3).with_active_requests([0, 4, UNKNOWN]).with_error_rate([NAN, 0.5, 0.0]);
    same(&composition.totals(&Request::test(), &candidates), &[(1.0 + 3.0 * 0.75) / 4.0, 1.5 / 4.0, (0.5 + 3.0) / 4.0]);
}

#[test]
fn a_scorer_that_knows_nothing_is_left_out() {
    let composition = Composition::new(Picker::Best).with(1.0, scorers::ActiveRequests).with(9.0, scorers::Queue);
    let candidates = Candidates::test(2).with_active_requests([1, 2]);
    same(&composition.totals(&Request::test(), &candidates), &[0.5, 0.0]);
    same(&Composition::new(Picker::Best).totals(&Request::test(), &candidates), &[0.0, 0.0]);
}

struct Avoid(usize);

impl Scorer for Avoid {
    fn name(&self) -> &str {
        "avoid"
    }

    fn score(&self, _: &Request, _: &Candidates, scores: &mut [f32]) {
        scores[self.0] = f32::NEG_INFINITY;
    }
}

#[test]
fn what_is_to_be_avoided_is_last_and_still_there() {
    for picker in [Picker::Best, Picker::Softmax { temperature: 0.1 }, Picker::TopK { k: 1 }] {
        let composition = Composition::new(picker).with(1.0, scorers::ActiveRequests).with(0.1, Avoid(1));
        let candidates = Candidates::test(3).with_active_requests([9, 0, 5]);
        let Decision::Place(rows) = composition.route(&Request::test(), &candidates) else { panic!("not placed") };
        assert_eq!((rows.len(), rows[2]), (3, 1), "{picker:?}");
    }
}

#[test]
fn each_term_is_explained_by_its_name() {
    testing::reset();
    testing::set_explain_wanted(true);
    let composition = Composition::new(Picker::Best).with(1.0, scorers::ActiveRequests).with(1.0, scorers::Queue);
    let _ = composition.route(&Request::test(), &Candidates::test(2).with_active_requests([1, 2]));
    let terms: Vec<String> = testing::explanations().into_iter().map(|(term, _)| term).collect();
    assert_eq!(terms, ["active_requests", "queue", "total"]);
    testing::reset();
}

fn firsts(picker: Picker, totals: &[f32], draws: u32) -> Vec<u32> {
    let mut firsts = vec![0; totals.len()];
    for _ in 0..draws {
        firsts[picker.pick(totals)[0] as usize] += 1;
    }
    firsts
}

#[test]
fn softmax_draws_in_proportion_to_the_exponentials() {
    // exp(0.7 / 0.5) : exp(0.2 / 0.5) is e : 1.
    let firsts = firsts(Picker::Softmax { temperature: 0.5 }, &[0.7, 0.2], 20_000);
    let share = f64::from(firsts[0]) / 20_000.0;
    assert!((share - std::f64::consts::E / (1.0 + std::f64::consts::E)).abs() < 0.02, "{share}");
}

#[test]
fn top_k_takes_each_of_the_best_alike_and_nobody_else() {
    let firsts = firsts(Picker::TopK { k: 3 }, &[0.1, 0.9, 0.8, 0.7], 9000);
    assert_eq!(firsts[0], 0);
    assert!(firsts[1..].iter().all(|count| (2500..3500).contains(count)), "{firsts:?}");
    assert_eq!(self::firsts(Picker::TopK { k: 16 }, &[0.5], 1), [1]);
}

#[test]
fn settings_are_refused_by_name() {
    let refused = |json: &str| serde_json::from_str::<Settings>(json).unwrap().compose().err().unwrap();
    assert_eq!(refused(r#"{"weights": {"queue": -1}}"#), "weights.queue is -1; use a number of at least 0");
    assert!(refused(r#"{"picker": {"softmax": {"temperature": 0}}}"#).contains("temperature is 0"));
    assert!(refused(r#"{"picker": {"top_k": {"k": 17}}}"#).contains("from 1 to 16"));
    assert!(refused(r#"{"labels": [{"key": "gpu", "value": "x", "weight": -2}]}"#).contains("\"gpu\" is -2"));
    assert!(Settings::default().compose().is_ok());
    let all = r#"{"signals": [{"name": "price", "weight": 1, "prefer": "low"}], "picker": "best"}"#;
    assert!(serde_json::from_str::<Settings>(all).unwrap().compose().is_ok());
    assert!(serde_json::from_str::<Settings>(r#"{"weights": {"quue": 1}}"#).is_err());
}

fn load() -> impl Strategy<Value = u32> {
    prop_oneof![4 => 0u32..100_000, 1 => Just(UNKNOWN)]
}

proptest! {
    /// Whatever is known or not, every candidate may be ranked, each at most once, and totals stay in their range.
    #[test]
    fn rankings_are_valid_whatever_is_unknown(
        rows in prop::collection::vec((load(), load(), prop_oneof![4 => 0f32..1.0, 1 => Just(NAN)]), 1..60),
        picker in prop_oneof![Just(Picker::Best), Just(Picker::Softmax { temperature: 0.05 }), Just(Picker::TopK { k: 5 })],
    ) {
        let column = |of: fn(&(u32, u32, f32)) -> u32| rows.iter().map(of).collect::<Vec<_>>();
        let candidates = Candidates::test(rows.len() as u32)
            .with_active_prefill_tokens(column(|row| row.0))
            .with_kv_tokens_free(column(|row| row.1))
            .with_kv_tokens_total(vec![100_000; rows.len()])
            .with_error_rate(rows.iter().map(|row| row.2).collect::<Vec<_>>());
        let composition = Settings { picker, ..Settings::default() }.compose().unwrap();
        let totals = composition.totals(&Request::test(), &candidates);
        prop_assert!(totals.iter().all(|total| (-1e-5..=1.00001).contains(total)), "{:?}", totals);
        let mut ranked = picker.pick(&totals);
        prop_assert_eq!(ranked.len(), rows.len().min(16));
        ranked.sort_unstable();
        ranked.dedup();
        prop_assert_eq!(ranked.len(), rows.len().min(16));
        prop_assert!(ranked.iter().all(|&row| (row as usize) < rows.len()));
    }
}
