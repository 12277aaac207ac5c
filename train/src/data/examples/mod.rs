//! Examples to fine-tune on, from JSON lines.
//!
//! A line is an object with `messages` (turns with `role` and `content`, written by the model's chat template), with
//! `prompt` and `completion` (texts, or turns), or with a text. The model is trained on completions, on the assistant's
//! turns including their end tokens, and on whole texts.

mod encode;
mod example;
mod list;
mod located;
mod options;
mod read;

pub use example::Example;
pub use list::ExampleList;
pub use located::{Located, Location, Question, Read, each_example, each_question};
pub use options::{ExampleOptions, TooLong};
pub use read::Examples;

#[cfg(test)]
mod tests;
