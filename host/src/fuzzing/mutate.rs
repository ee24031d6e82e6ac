//! A mutator: from seeds to inputs that are nearly right, which is where readers break. Deterministic by its seed.

/// Longest input that is made.
const MAX_BYTES: usize = 4096;

/// Texts that mean something to one of the readers.
const TOKENS: &[&[u8]] = &[
    b"\n\n",
    b"\r\n\r\n",
    b"\n",
    b"data: ",
    b"data: [DONE]",
    b"event: error",
    b"null",
    b"true",
    b"{}",
    b"[]",
    b"\"\"",
    b"\\u0000",
    b"\\ud800",
    b"-1",
    b"0",
    b"1e999",
    b"18446744073709551616",
    b"4294967295",
    b"\"model\":",
    b"\"prompt\":",
    b"\"messages\":",
    b"\"stream\":",
    b"\"n\":",
    b"\"priority\":",
    b"\"kv_transfer_params\":",
    b"\"vllm_xargs\":",
    b"\"x-dynamo-\":",
    b"http://",
    b"mock://",
    b"[::1]",
    b":0",
    b"@",
    b"?",
    b"#",
    b"%",
    b",label.",
    b",role=",
    b"\0asm",
    b"\xff\xff\xff\xff\x0f",
];

/// Makes inputs.
pub struct Mutator {
    random: u64,
}

impl Mutator {
    /// The same inputs for the same seed.
    #[must_use]
    pub fn new(seed: u64) -> Self {
        Self { random: seed }
    }

    /// One of the seeds with up to eight changes.
    pub fn next(&mut self, seeds: &[Vec<u8>]) -> Vec<u8> {
        let mut input = self.pick(seeds).cloned().unwrap_or_default();
        for _ in 0..=self.below(8) {
            self.change(&mut input, seeds);
        }
        input.truncate(MAX_BYTES);
        input
    }

    fn change(&mut self, input: &mut Vec<u8>, seeds: &[Vec<u8>]) {
        let at = self.below(input.len() + 1);
        let end = at + self.below(input.len() - at + 1).min(32);
        match self.below(7) {
            // A bit.
            0 => input.iter_mut().skip(at).take(1).for_each(|byte| *byte ^= 1 << (self.random >> 32 & 7)),
            // A byte.
            1 => {
                let byte = self.below(256) as u8;
                input.insert(at, byte);
            }
            // A part less.
            2 => drop(input.drain(at..end)),
            // A part twice.
            3 => {
                let part = input[at..end].to_vec();
                input.splice(at..at, part);
            }
            // A text that means something, beside or in place of what is there.
            4 | 5 => {
                let token = TOKENS[self.below(TOKENS.len())].to_vec();
                let end = if self.below(2) == 0 { at } else { end };
                input.splice(at..end, token);
            }
            // The rest of another seed.
            _ => {
                let other = self.pick(seeds).cloned().unwrap_or_default();
                let from = self.below(other.len() + 1);
                input.truncate(at);
                input.extend_from_slice(&other[from..]);
            }
        }
    }

    fn pick<'a, T>(&mut self, from: &'a [T]) -> Option<&'a T> {
        let at = self.below(from.len().max(1));
        from.get(at)
    }

    /// From 0 to one below `bound`; splitmix64 (Steele et al. 2014).
    fn below(&mut self, bound: usize) -> usize {
        self.random = self.random.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let x = (self.random ^ (self.random >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((x ^ (x >> 31)) % bound as u64) as usize
    }
}
