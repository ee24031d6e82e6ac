//! `dynamo-host profile`: a live engine's profile, to a file or stdout; how good it is, on stderr.
#![allow(clippy::print_stdout, clippy::print_stderr)]

use std::{fs, path::PathBuf, time::Duration};

use crate::{
    config::WorkerConfig,
    profile::{Bounds, Fit, Measured, measure},
    roster::engine,
};

/// What to measure, and how much of it.
#[derive(clap::Args)]
pub(super) struct ProfileFlags {
    /// The engine, as serve has it: URL[,kind=…][,bearer_env=…][,bearer_file=…][,ca_file=…]
    #[arg(value_name = "URL")]
    engine: String,
    /// Its model [default: the first that it lists]
    #[arg(long, value_name = "NAME")]
    model: Option<String>,
    /// What it is: vllm, sglang, trtllm, llamacpp, openai [default: it is asked]
    #[arg(long, value_name = "KIND")]
    kind: Option<String>,
    /// Seconds that it may take
    #[arg(long, value_name = "S", default_value_t = 120, value_parser = clap::value_parser!(u64).range(5..=86_400))]
    max_seconds: u64,
    /// Tokens that it may ask for, prompts and outputs together
    #[arg(long, value_name = "N", default_value_t = 500_000)]
    max_tokens: u64,
    /// Longest prompt
    #[arg(long, value_name = "N", default_value_t = 8192, value_parser = clap::value_parser!(u32).range(64..=1_000_000))]
    max_prompt: u32,
    /// Where to write the profile [default: stdout]
    #[arg(long, short, value_name = "FILE")]
    out: Option<PathBuf>,
}

pub(super) async fn run(flags: ProfileFlags) -> Result<(), String> {
    let kind = flags.kind.as_ref().map(|kind| format!(",kind={kind}")).unwrap_or_default();
    let config: WorkerConfig = format!("{}{kind}", flags.engine).parse()?;
    let model = flags.model.as_deref().or(config.model.as_deref());
    let bounds = Bounds { time: Duration::from_secs(flags.max_seconds), tokens: flags.max_tokens, longest: flags.max_prompt };
    let measured = measure(engine(&config)?, model, &bounds).await?;
    report(&measured);
    let json = serde_json::to_string_pretty(&measured.profile).map_err(|error| error.to_string())? + "\n";
    match &flags.out {
        Some(path) => fs::write(path, json).map_err(|error| format!("{} cannot be written: {error}", path.display())),
        None => {
            print!("{json}");
            Ok(())
        }
    }
}

fn report(measured: &Measured) {
    let Measured { profile, prefill, prefill_points, decode, decode_points, known_by, warnings } = measured;
    eprintln!(
        "prefill   {:.3} ms + {:.3e} ms per token + {:.3e} ms per token²{}",
        profile.prefill_ms_base,
        profile.prefill_ms_per_token,
        profile.prefill_ms_per_token_squared,
        quality(prefill, *prefill_points)
    );
    if let Some(decode) = decode {
        eprintln!(
            "decode    {:.3} ms + {:.3e} ms per sequence + {:.3e} ms per token of context{}",
            profile.decode_ms_base,
            profile.decode_ms_per_sequence,
            profile.decode_ms_per_context_token,
            quality(decode, *decode_points)
        );
    }
    for (key, value, how) in known_by {
        eprintln!("{key:<23} {value:>9}  {how}");
    }
    for warning in warnings {
        eprintln!("warning: {warning}");
    }
}

fn quality(fit: &Fit, points: usize) -> String {
    let worst = fit
        .worst
        .as_ref()
        .map(|(point, fitted)| format!(", worst at {}: {:.2} ms measured, {fitted:.2} ms by the fit", point.name, point.ms));
    format!("; {points} points, R² {:.4}{}", fit.r_squared, worst.unwrap_or_default())
}
