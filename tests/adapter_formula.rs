//! Evaluates what a structure says it trains: `r (d_in + d_out)`, with the names of its options.

use lowrank_models::adapter::{AdapterOptions, Place};

/// Products stand side by side or with `*`; `min(a, b)`, whole division, flags as 0 and 1. What follows a semicolon is not read.
pub fn value(text: &str, place: &Place, options: &AdapterOptions) -> Result<usize, String> {
    let text = text.split(';').next().unwrap_or(text);
    let mut parser = Parser { words: words(text), at: 0, place, options };
    let value = parser.sum()?;
    match parser.words.get(parser.at) {
        None => Ok(value),
        Some(word) => Err(format!("does not end before \"{word}\"")),
    }
}

fn words(text: &str) -> Vec<String> {
    let mut words: Vec<String> = Vec::new();
    let mut inside = false;
    for c in text.chars() {
        let part = c.is_ascii_alphanumeric() || c == '_';
        match words.last_mut() {
            Some(word) if part && inside => word.push(c),
            _ if c != ' ' => words.push(c.to_string()),
            _ => (),
        }
        inside = part;
    }
    words
}

struct Parser<'a> {
    words: Vec<String>,
    at: usize,
    place: &'a Place,
    options: &'a AdapterOptions,
}

impl Parser<'_> {
    fn next_is(&mut self, word: &str) -> bool {
        let is = self.words.get(self.at).is_some_and(|next| next == word);
        self.at += usize::from(is);
        is
    }

    fn sum(&mut self) -> Result<usize, String> {
        let mut value = self.product()?;
        loop {
            if self.next_is("+") {
                value += self.product()?;
            } else if self.next_is("-") {
                value -= self.product()?;
            } else {
                return Ok(value);
            }
        }
    }

    fn product(&mut self) -> Result<usize, String> {
        let mut value = self.factor()?;
        loop {
            if self.next_is("/") {
                value /= self.factor()?;
            } else if self.next_is("*") || !self.ends() {
                value *= self.factor()?;
            } else {
                return Ok(value);
            }
        }
    }

    fn ends(&self) -> bool {
        self.words.get(self.at).is_none_or(|word| ["+", "-", ")", ","].contains(&word.as_str()))
    }

    fn factor(&mut self) -> Result<usize, String> {
        let word = self.words.get(self.at).cloned().ok_or("ends too early")?;
        self.at += 1;
        let closed =
            |parser: &mut Self| if parser.next_is(")") { Ok(()) } else { Err("a bracket is open".to_string()) };
        match word.as_str() {
            "(" => {
                let value = self.sum()?;
                closed(self)?;
                Ok(value)
            }
            "min" if self.next_is("(") => {
                let one = self.sum()?;
                if !self.next_is(",") {
                    return Err("min takes two values".into());
                }
                let two = self.sum()?;
                closed(self)?;
                Ok(one.min(two))
            }
            "d_in" => Ok(self.place.shape[0]),
            "d_out" => Ok(self.place.shape[1]),
            "r" => Ok(self.place.rank),
            name => match (name.parse(), self.options.get(name)) {
                (Ok(number), _) => Ok(number),
                (_, Some(option)) => {
                    let number = option.as_u64().or(option.as_bool().map(u64::from));
                    number.map(|number| number as usize).ok_or_else(|| format!("{name} is {option}"))
                }
                _ => Err(format!("\"{name}\" is neither d_in, d_out, r nor an option")),
            },
        }
    }
}
