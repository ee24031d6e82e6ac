use super::*;

fn segment(stream: u32, tokens: u32) -> Segment {
    Segment { stream, tokens }
}

#[test]
fn mooncakes_lines_share_streams_by_their_hash_ids() {
    let text = concat!(
        "{\"timestamp\": 3000, \"input_length\": 700, \"output_length\": 0, \"hash_ids\": [0, 9]}\n\n",
        "{\"timestamp\": 1000, \"input_length\": 512, \"output_length\": 3, \"hash_ids\": [0], \"more\": 1}\n",
    );
    let trace = Trace::parse("t", text).unwrap();
    let expected = [
        TraceRequest { at: Duration::ZERO, prompt: [segment(0, 512)].into(), output_tokens: 3, session: None },
        TraceRequest {
            at: Duration::from_secs(2),
            prompt: [segment(0, 512), segment(1, 188)].into(),
            output_tokens: 1,
            session: None,
        },
    ];
    assert_eq!(trace.requests, expected);
    assert_eq!((trace.longest(), trace.span()), (701, Duration::from_secs(2)));
}

#[test]
fn azures_lines_have_prompts_unlike_all_others() {
    let text =
        "TIMESTAMP,ContextTokens,GeneratedTokens\r\n2023-11-16 23:59:59.5000000,374,44\r\n2023-11-17 00:00:01.25,396,109\r\n";
    let trace = Trace::parse("t", text).unwrap();
    let request = |ms, stream, tokens, output_tokens| TraceRequest {
        at: Duration::from_millis(ms),
        prompt: [segment(stream, tokens)].into(),
        output_tokens,
        session: None,
    };
    assert_eq!(trace.requests, [request(0, 0, 374, 44), request(1750, 1, 396, 109)]);
}

#[track_caller]
fn check_broken(text: &str, expected: &str) {
    let error = Trace::parse("f", text).unwrap_err().to_string();
    assert!(error.contains(expected), "{error}");
}

#[test]
fn a_broken_line_is_named_with_what_was_expected() {
    let good = r#"{"timestamp": 0, "input_length": 700, "output_length": 1, "hash_ids": [0, 1]}"#;
    check_broken(&format!("{good}\n\n{{\"timestamp\": 1"), "line 3: EOF while parsing");
    check_broken(&format!("{good}\nhello\n"), "line 2: expected value");
    check_broken(&good.replace("[0, 1]", "[0]"), "line 1: 1 hash_ids for input_length 700, which is 2 blocks of 512 tokens");
    check_broken(&good.replace("input_length", "input"), "missing field `input_length`");
    check_broken(&good.replace("700", "0"), "a prompt has at least 1 token; a line is {\"timestamp\"");
    check_broken(&good.replace("\"timestamp\": 0", "\"timestamp\": -1"), "timestamp -1 is no time");
    let header = "TIMESTAMP,ContextTokens,GeneratedTokens";
    check_broken(&format!("{header}\n2023-11-16 18:15:46.68,1"), "line 2: 2 fields instead of 3; a line is TIMESTAMP,");
    check_broken(&format!("{header}\nyesterday,1,1"), "line 2: the time is \"yesterday\"");
    check_broken(&format!("{header}\n2023-11-16 18:15:46.68,many,1"), "line 2: ContextTokens is \"many\", not a whole number");
    check_broken("a,b,c\n", "of no known format");
    check_broken("\n \n", "holds no request");
    check_broken(&format!("{header}\n"), "holds no request");
}

#[test]
fn a_file_that_is_not_there_says_what_could_be() {
    let error = Trace::open("/nowhere/trace.jsonl", 0).unwrap_err().to_string();
    assert!(error.contains("/nowhere/trace.jsonl") && error.contains("synthetic:"), "{error}");
}

#[test]
fn a_synthetic_trace_is_what_its_options_say() {
    let source = "synthetic:requests=20000,rate=50,prefixes=10,zipf=1,prefix_tokens=100,turns=4,think_s=5,input=300,output=50";
    let trace = Trace::open(source, 1).unwrap();
    assert_eq!(trace.requests, Trace::open(source, 1).unwrap().requests);
    assert_ne!(trace.requests, Trace::open(source, 2).unwrap().requests);
    assert!(trace.requests.is_sorted_by_key(|request| request.at));
    let count = trace.requests.len() as f64;
    assert_eq!(count, 20_000.0);
    let rate = count / trace.span().as_secs_f64();
    assert!((45.0..55.0).contains(&rate), "{rate}");
    let output = trace.requests.iter().map(|request| f64::from(request.output_tokens)).sum::<f64>() / count;
    assert!((48.0..53.0).contains(&output), "{output}");
    let sessions: std::collections::HashSet<_> = trace.requests.iter().map(|request| request.session).collect();
    assert!((4500..5500).contains(&sessions.len()), "{}", sessions.len());
    let of_first = trace.requests.iter().filter(|request| request.prompt[0] == segment(0, 100)).count() as f64 / count;
    assert!((0.28..0.40).contains(&of_first), "the first of ten has a share of 0.34: {of_first}");
}

#[test]
fn synthetic_options_that_cannot_be_say_why() {
    for (options, expected) in [
        ("requests", "\"requests\" is not KEY=VALUE"),
        ("requests=0", "requests=0 is not a whole number of at least 1"),
        ("rate=0", "rate=0 is not above 0"),
        ("turns=0.5", "turns=0.5 is below 1"),
        ("think=1", "\"think\" is not known"),
        ("zipf=-1", "zipf=-1 is not a number of at least 0"),
        ("max_input=10", "max_input=10 is not above prefix_tokens=1024"),
    ] {
        let error = Trace::open(&format!("synthetic:{options}"), 0).unwrap_err().to_string();
        assert!(error.contains(expected) && error.contains("use synthetic:KEY=VALUE"), "{error}");
    }
}
