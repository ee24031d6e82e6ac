//! The seam in a choice's text: what of a continuation the client has already, and stop strings that lie across it.

/// What stands between a continuation's text and the client, until the seam is past.
#[derive(Debug, Default)]
pub(super) struct Seam {
    /// What the continuation may say again with its first text, as llama.cpp's server 0.5 does with a message that it goes on with.
    echo: String,
    /// White space that the client has, and that the continuation may say again.
    overlap: String,
    /// Stop strings that the client's text may be in the middle of.
    begun: Vec<Begun>,
    /// Text that may be the rest of one of them.
    held: String,
    includes_stop: bool,
}

#[derive(Debug)]
struct Begun {
    stop: String,
    rest: String,
}

/// What the client gets of a piece of text.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Passed {
    Text(String),
    /// A stop string was complete: that is the end.
    Stop {
        text: String,
        stop: String,
    },
}

impl Seam {
    /// Behind `text`, of which the continuation was not told the last `untold` bytes.
    pub(super) fn new(text: &str, untold: usize, stops: &[String], includes_stop: bool) -> Self {
        let begun = stops.iter().flat_map(|stop| {
            let cuts = stop.char_indices().skip(1).map(|(at, _)| at);
            cuts.filter(|&at| text.ends_with(&stop[..at])).map(|at| Begun { stop: stop.clone(), rest: stop[at..].to_owned() })
        });
        let overlap = text[text.len() - untold..].to_owned();
        Self { echo: String::new(), overlap, begun: begun.collect(), held: String::new(), includes_stop }
    }

    /// The continuation may begin with all of this, in one piece. Other versions do not say it again.
    pub(super) fn may_echo(&mut self, content: String) {
        self.echo = content;
    }

    /// Whether there is text that may belong to a stop string, and comes later if it does not.
    pub(super) fn is_holding(&self) -> bool {
        !self.held.is_empty()
    }

    /// What the client gets of the next piece of text; `is_last`: none comes after it.
    pub(super) fn pass(&mut self, text: &str, is_last: bool) -> Passed {
        let mut text = text;
        if !self.echo.is_empty() && !text.is_empty() {
            let echo = std::mem::take(&mut self.echo);
            text = text.strip_prefix(&*echo).unwrap_or(text);
        }
        if !self.overlap.is_empty() && !text.is_empty() {
            let same = self.overlap.bytes().zip(text.bytes()).take_while(|(one, other)| one == other).count();
            let same = text.floor_char_boundary(same);
            // It goes on to match, or it was all that matches.
            let rest = if same == text.len() { self.overlap[same..].to_owned() } else { String::new() };
            (self.overlap, text) = (rest, &text[same..]);
        }
        if self.begun.is_empty() {
            return Passed::Text(text.to_owned());
        }
        self.held.push_str(text);
        if let Some(Begun { stop, rest }) =
            self.begun.iter().filter(|begun| self.held.starts_with(&begun.rest)).min_by_key(|begun| begun.rest.len())
        {
            let text = if self.includes_stop { rest.clone() } else { String::new() };
            return Passed::Stop { text, stop: stop.clone() };
        }
        self.begun.retain(|begun| begun.rest.starts_with(&self.held));
        if is_last {
            self.begun.clear();
        }
        Passed::Text(if self.begun.is_empty() { std::mem::take(&mut self.held) } else { String::new() })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn seam(text: &str, untold: usize, stops: &[&str]) -> Seam {
        Seam::new(text, untold, &stops.iter().map(|&stop| stop.to_owned()).collect::<Vec<_>>(), false)
    }

    fn text(text: &str) -> Passed {
        Passed::Text(text.to_owned())
    }

    #[test]
    fn without_anything_at_the_seam_text_passes() {
        let mut plain = seam("abc", 0, &["END"]);
        assert_eq!((plain.pass("END? no", false), plain.pass("", true)), (text("END? no"), text("")));
    }

    #[test]
    fn what_is_said_again_at_once_is_not_passed_and_what_is_not_is() {
        let mut echoing = seam("me begin", 0, &[]);
        echoing.may_echo("me begin".to_owned());
        assert_eq!((echoing.pass("me begin count", false), echoing.pass("me begin", true)), (text(" count"), text("me begin")));
        let mut plain = seam("me begin", 0, &[]);
        plain.may_echo("me begin".to_owned());
        assert_eq!((plain.pass(" count", false), plain.pass("me begin", true)), (text(" count"), text("me begin")));
    }

    #[test]
    fn white_space_that_the_client_has_is_not_said_again() {
        let mut spaced = seam("so \n", 2, &[]);
        assert_eq!(
            [spaced.pass(" ", false), spaced.pass("\n then", false), spaced.pass(" \n", false)],
            [text(""), text(" then"), text(" \n")]
        );
        let mut other = seam("so \n", 2, &[]);
        assert_eq!(other.pass("then", false), text("then"));
        let mut partly = seam("so \n", 2, &[]);
        assert_eq!(partly.pass(" x \n", false), text("x \n"));
    }

    #[test]
    fn a_stop_string_across_the_seam_ends_the_text() {
        let mut across = seam("the E", 0, &["END"]);
        assert_eq!(across.pass("N", false), text(""));
        assert_eq!(across.pass("D and more", false), Passed::Stop { text: String::new(), stop: "END".to_owned() });
        let mut including = Seam::new("the é", 0, &["éé!".to_owned()], true);
        assert_eq!(including.pass("é!", false), Passed::Stop { text: "é!".to_owned(), stop: "éé!".to_owned() });
    }

    #[test]
    fn what_only_looked_like_a_stop_string_comes_in_full() {
        let mut looks = seam("the E", 0, &["END", "EE"]);
        assert_eq!((looks.pass("N", false), looks.pass("T", false), looks.pass("ND", false)), (text(""), text("NT"), text("ND")));
        let mut ends = seam("the E", 0, &["END"]);
        assert_eq!((ends.pass("N", false), ends.pass("", true)), (text(""), text("N")));
    }
}
