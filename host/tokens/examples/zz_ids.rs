fn main() {
    use dynamo_host_tokens::*;
    let dir = std::env::args().nth(1).unwrap();
    let t = Tokenizer::load(dir.as_ref(), RunCache::new(RunCache::DEFAULT_BYTES)).unwrap();
    let plain = Tokenizer::load(dir.as_ref(), RunCache::new(0)).unwrap();
    for line in std::io::stdin().lines() {
        let line = line.unwrap();
        let e = if line.contains("\"messages\"") {
            dynamo_host_core::Endpoint::ChatCompletions
        } else {
            dynamo_host_core::Endpoint::Completions
        };
        let ids = |t: &Tokenizer| {
            let b = std::time::Instant::now();
            let x = t.finish(t.begin(&Asked::of(e, line.as_bytes())).unwrap()).unwrap();
            eprintln!("{} bytes {} tokens {:?}", line.len(), x.ids.len(), b.elapsed());
            x.ids
        };
        let a = ids(&t);
        assert_eq!(a, ids(&t));
        assert_eq!(a, ids(&plain));
        println!("{a:?}");
    }
}
