use proptest::prelude::*;

use super::*;

const RULES: OutlierRules = OutlierRules { factor: 3.0, max_share: 0.3, first_pause_ms: 10_000, max_pause_ms: 60_000, trials: 3 };

fn row(itl: f32) -> Row {
    Row { measure: Measure { ttft: None, itl: Some(itl) }, is_serving: true }
}

fn pool(itls: &[f32]) -> Vec<Row> {
    itls.iter().map(|&itl| row(itl)).collect()
}

fn out(pool: &[Row]) -> Vec<usize> {
    outliers(pool, &RULES).into_iter().map(|(at, _)| at).collect()
}

#[test]
fn one_that_is_much_slower_than_its_pool_is_an_outlier() {
    assert_eq!(out(&pool(&[20.0, 22.0, 19.0, 200.0])), [3]);
    assert_eq!(outliers(&pool(&[20.0, 20.0, 100.0]), &RULES), [(2, Slow::Itl { ms: 100.0, pool_ms: 20.0 })]);
}

#[test]
fn neither_a_pool_that_spreads_nor_a_little_more_nor_two_alone_are_outliers() {
    assert_eq!(out(&pool(&[20.0, 22.0, 19.0, 50.0])), [] as [usize; 0]);
    assert_eq!(out(&pool(&[10.0, 40.0, 70.0, 20.0, 95.0])), [] as [usize; 0]);
    assert_eq!(out(&pool(&[20.0, 400.0])), [] as [usize; 0]);
    assert_eq!(out(&pool(&[0.1, 0.1, 0.1, 2.0])), [] as [usize; 0], "nobody feels 2 ms");
}

#[test]
fn the_slowest_go_first_and_no_more_than_a_share_whatever_they_are_out_for() {
    let mut many = pool(&[20.0; 10]);
    for (at, itl) in [(1, 300.0), (4, 500.0), (6, 400.0), (8, 200.0)] {
        many[at] = row(itl);
    }
    assert_eq!(out(&many), [4, 6, 1]);
    many[9].is_serving = false;
    assert_eq!(out(&many), [4, 6]);
    let mut four = pool(&[20.0, 20.0, 20.0, 500.0]);
    assert_eq!(out(&four), [3]);
    four[0].is_serving = false;
    assert_eq!(out(&four), [] as [usize; 0], "one of four is out already");
}

#[test]
fn long_prompts_are_not_slow_by_being_long() {
    let mut workers = [const { Vec::new() }; 4];
    // Each takes 20 ms and 0.1 ms a token; the last one has long prompts.
    for (at, requests) in workers.iter_mut().enumerate() {
        let tokens = if at == 3 { 8000u32 } else { 100 };
        *requests = vec![(20.0 + 0.1 * tokens as f32, tokens); 5];
    }
    let judged = |workers: &[Vec<(f32, u32)>; 4]| {
        let rows = workers.each_ref().map(|requests| {
            let mut latencies = Latencies::default();
            requests.iter().for_each(|&(ttft, tokens)| latencies.first_token(ttft, tokens, 0));
            Row { measure: latencies.measure(0), is_serving: true }
        });
        outliers(&rows, &RULES)
    };
    assert_eq!(judged(&workers), []);
    workers[3].iter_mut().for_each(|(ttft, _)| *ttft *= 8.0);
    assert!(matches!(judged(&workers)[..], [(3, Slow::Ttft { .. })]));
}

#[test]
fn few_or_old_requests_say_nothing() {
    let mut latencies = Latencies::default();
    (0..4).for_each(|at| latencies.tokens(10.0, at));
    assert_eq!(latencies.measure(4), Measure::default());
    latencies.tokens(10.0, 4);
    assert_eq!(latencies.measure(4).itl, Some(10.0));
    latencies.tokens(f32::NAN, 4);
    assert_eq!(latencies.measure(60_003), Measure::default(), "the first ones are too old");
}

#[test]
fn it_is_left_out_for_longer_each_time_and_comes_back_by_a_trial() {
    let mut ejection = Ejection::default();
    let slow = Slow::Itl { ms: 9.0, pool_ms: 1.0 };
    ejection.eject(slow, &RULES, 0);
    assert_eq!(ejection.place(9_999), Place::Out { until_ms: 10_000 });
    assert_eq!(ejection.place(10_000), Place::Trial);
    (0..3).for_each(|_| ejection.latencies.tokens(50.0, 10_000));
    assert_eq!(ejection.measure(&RULES, 10_000).itl, Some(50.0), "three requests are enough on trial");
    ejection.eject(slow, &RULES, 10_000);
    assert_eq!(ejection.place(10_000), Place::Out { until_ms: 30_000 });
    assert_eq!(ejection.place(30_000), Place::Trial);
    ejection.readmit(30_000);
    assert_eq!(ejection.place(30_000), Place::In);
    // Well for long: the first pause again.
    ejection.eject(slow, &RULES, 90_000);
    assert_eq!(ejection.place(90_000), Place::Out { until_ms: 100_000 });
}

proptest! {
    #[test]
    fn the_cap_holds_whatever_was_measured(
        rows in prop::collection::vec((prop::option::of(0.0f32..1e6), prop::option::of(0.0f32..1e6), any::<bool>()), 0..40),
    ) {
        let pool: Vec<Row> =
            rows.iter().map(|&(ttft, itl, is_serving)| Row { measure: Measure { ttft, itl }, is_serving }).collect();
        let found = outliers(&pool, &RULES);
        let serving = pool.iter().filter(|row| row.is_serving).count();
        let out_before = pool.len() - serving;
        let most = ((0.3 * pool.len() as f64).floor() as usize).max(1);
        if !found.is_empty() {
            prop_assert!(out_before + found.len() <= most, "{} + {} of {}", out_before, found.len(), pool.len());
            prop_assert!(found.len() < serving, "one stays");
        }
        for (at, slow) in &found {
            prop_assert!(pool[*at].is_serving);
            let (Slow::Ttft { ms, pool_ms } | Slow::Itl { ms, pool_ms }) = *slow;
            prop_assert!(ms > RULES.factor * pool_ms);
        }
    }

    #[test]
    fn the_median_is_in_the_middle(mut values in prop::collection::vec(-1e6f32..1e6, 1..50)) {
        let found = median(&mut values).unwrap();
        let (below, above) = (values.iter().filter(|v| **v < found).count(), values.iter().filter(|v| **v > found).count());
        prop_assert!(below <= values.len() / 2 && above <= values.len() / 2);
    }
}
