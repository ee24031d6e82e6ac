//! Who fits whom, and what is said of those who do not.

use super::*;

fn shape(block_size: u32) -> Shape {
    Shape { protocol: Some(Protocol::Nixl), block_size: Some(block_size), tokens: Some(7), context: Some(4096) }
}

fn claim(engine: &str, role: Role, shape: Shape) -> Claim<'_> {
    Claim { engine, kind: "vllm", model: "m", role, shape, is_known: true }
}

/// What is found of the last of them.
fn last(claims: &[Claim<'_>]) -> Fit {
    fits(claims).pop().unwrap()
}

fn reason(fit: &Fit) -> &str {
    match fit {
        Fit::Nobody(reason) => reason,
        _ => panic!("it fits: {fit:?}"),
    }
}

#[test]
fn workers_of_one_shape_fit_and_what_is_not_known_is_as_with_the_others() {
    let bare = Shape { block_size: None, tokens: None, context: None, ..shape(16) };
    for other in [shape(16), bare] {
        let found = fits(&[claim("p", Role::Prefill, shape(16)), claim("d", Role::Decode, other)]);
        assert!(matches!(found[0], Fit::With(_)) && found[0] == found[1], "{found:?}");
    }
    let both = fits(&[claim("a", Role::Both, shape(16)), claim("b", Role::Both, shape(16))]);
    assert!(matches!(both[..], [Fit::With(a), Fit::With(b)] if a == b));
}

#[test]
fn nobody_to_hand_to_is_no_fault_of_a_worker() {
    assert_eq!(last(&[claim("p", Role::Prefill, shape(16)), claim("q", Role::Prefill, shape(16))]), Fit::Alone);
    assert_eq!(last(&[claim("a", Role::Both, shape(16)), claim("a", Role::Both, shape(16))]), Fit::Alone, "ranks of one engine");
    let elsewhere = Claim { model: "n", ..claim("d", Role::Decode, shape(16)) };
    assert_eq!(last(&[claim("p", Role::Prefill, shape(16)), elsewhere]), Fit::Alone);
    let away = Claim { is_known: false, ..claim("d", Role::Decode, Shape::default()) };
    assert_eq!(last(&[claim("p", Role::Prefill, shape(16)), away]), Fit::Alone, "it was never reached");
}

#[test]
fn who_fits_nobody_is_told_in_what_it_differs_and_the_others_go_on() {
    let sound = || [claim("p", Role::Prefill, shape(16)), claim("d", Role::Decode, shape(16))];
    for (other, says) in [
        (shape(32), "mismatched block sizes: its KV blocks have 32 tokens, those of the prefill workers of its model (p) 16"),
        (Shape { tokens: Some(8), ..shape(16) }, "other tokens of a text"),
        (Shape { context: Some(8192), ..shape(16) }, "its longest context is 8192 tokens"),
        (Shape { protocol: Some(Protocol::Context), ..shape(16) }, "by context, the prefill workers of its model (p) by nixl"),
        (Shape::default(), "set handoff="),
    ] {
        let [p, d] = sound();
        let found = fits(&[p, d, claim("e", Role::Decode, other)]);
        assert!(matches!(found[..2], [Fit::With(p), Fit::With(d)] if p == d));
        assert!(reason(&found[2]).contains(says), "{}", reason(&found[2]));
    }
    let found = fits(&[claim("p", Role::Prefill, shape(16)), claim("d", Role::Decode, shape(32))]);
    assert!(found.iter().all(|fit| reason(fit).contains("mismatched block sizes")), "of two alone, nobody knows who is right");
}

#[test]
fn pools_of_two_shapes_are_two_pools() {
    let of = |size| [claim("p", Role::Prefill, shape(size)), claim("d", Role::Decode, shape(size))];
    let claims: Vec<_> = of(16).into_iter().chain(of(32)).collect();
    let found = fits(&claims);
    assert!(found[0] == found[1] && found[2] == found[3] && found[0] != found[2]);
    assert!(found.iter().all(|fit| matches!(fit, Fit::With(_))));
}

fn part(role: Role, group: Option<u64>) -> Part {
    Part { role, is_eligible: true, serves_whole: true, group, is_coming: false }
}

#[track_caller]
fn check(parts: &[Part], state: Together, says: &str) {
    let found = Disaggregation::of("m", parts).unwrap();
    assert_eq!(found.state, state);
    assert!(found.reason.unwrap_or_default().contains(says));
}

#[test]
fn how_a_model_is_served_is_said_with_the_way_to_have_it_split() {
    assert_eq!(Disaggregation::of("m", &[part(Role::Aggregated, None)]), None);
    check(&[part(Role::Prefill, Some(1)), part(Role::Decode, Some(1))], Together::Split, "");
    check(&[part(Role::Both, Some(1)), part(Role::Both, Some(1))], Together::Split, "");
    check(&[part(Role::Both, Some(1))], Together::NoPair, "served whole");
    check(&[part(Role::Prefill, Some(1)), part(Role::Decode, Some(2))], Together::NoPair, "worker list");
    check(
        &[part(Role::Prefill, None), part(Role::Aggregated, None)],
        Together::NoDecode,
        "role decode or both, so requests are served",
    );
    check(&[part(Role::Decode, None)], Together::NoPrefill, "add one");
    let away = Part { is_eligible: false, ..part(Role::Prefill, Some(1)) };
    check(&[away, part(Role::Decode, Some(1))], Together::NoPrefill, "none of its 1 prefill workers is ready");
    let alone = Part { serves_whole: false, ..part(Role::Decode, None) };
    check(&[alone], Together::NoPrefill, "cannot be served");
}
