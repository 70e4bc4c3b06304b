//! Values with rules of their own: secrets, URLs, bounded numbers, durations.

use std::fmt;
use std::marker::PhantomData;

use serde::Deserialize;
use serde::Deserializer;
use serde::de;
use serde::de::Visitor;

/// A credential. Never shown: neither by `Debug`, nor in the error about a wrong type.
#[derive(Clone, PartialEq, Eq, Default)]
pub struct Secret(String);

impl Secret {
    /// Wraps a credential that came from elsewhere (the environment, the API).
    pub fn new(secret: String) -> Self {
        Self(secret)
    }

    /// The credential, for building a request and for nothing else.
    pub fn expose(&self) -> &str {
        &self.0
    }

    /// Whether it is empty, which the samples use for "none".
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(if self.0.is_empty() { "(none)" } else { "(hidden)" })
    }
}

impl<'de> Deserialize<'de> for Secret {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Hidden;
        impl Visitor<'_> for Hidden {
            type Value = Secret;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a string")
            }
            fn visit_str<E: de::Error>(self, text: &str) -> Result<Secret, E> {
                Ok(Secret(text.to_owned()))
            }
            // The provided methods would quote the value.
            fn visit_bool<E: de::Error>(self, _: bool) -> Result<Secret, E> {
                Err(E::custom("invalid type: a boolean, expected a string"))
            }
            fn visit_i64<E: de::Error>(self, _: i64) -> Result<Secret, E> {
                Err(E::custom("invalid type: a number, expected a string"))
            }
            fn visit_u64<E: de::Error>(self, _: u64) -> Result<Secret, E> {
                self.visit_i64(0)
            }
            fn visit_f64<E: de::Error>(self, _: f64) -> Result<Secret, E> {
                self.visit_i64(0)
            }
        }
        deserializer.deserialize_any(Hidden)
    }
}

/// A URL, or `host[:port]`, that may carry user info or a signed query. Shown without either.
#[derive(Clone, PartialEq, Eq, Default, Deserialize)]
#[serde(transparent)]
pub struct Endpoint(String);

impl Endpoint {
    /// The whole text, for building a request.
    pub fn expose(&self) -> &str {
        &self.0
    }

    /// Whether nothing was given.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

impl From<&str> for Endpoint {
    fn from(text: &str) -> Self {
        Self(text.to_owned())
    }
}

impl fmt::Display for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (scheme, rest) = match self.0.split_once("://") {
            Some((scheme, rest)) if !scheme.contains('@') => (scheme, rest),
            _ => ("", self.0.as_str()),
        };
        let separator = if scheme.is_empty() { "" } else { "://" };
        let authority_end = rest.find(['/', '?', '#']).unwrap_or(rest.len());
        let (authority, tail) = rest.split_at(authority_end);
        if tail.contains('@') {
            // A password with a slash, or a path with an at sign: no telling which, so neither is shown.
            return write!(f, "{scheme}{separator}(hidden)");
        }
        let host = authority.rsplit_once('@').map_or(authority, |(_user, host)| host);
        let path = &tail[..tail.find(['?', '#']).unwrap_or(tail.len())];
        write!(f, "{scheme}{separator}{host}{path}")
    }
}

impl fmt::Debug for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(&self.to_string(), f)
    }
}

/// An integer from 0 to `MAX`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct UpTo<const MAX: u64>(pub(super) u64);

impl<const MAX: u64> UpTo<MAX> {
    /// The number as the narrower type that `MAX` was chosen for.
    pub(super) fn narrow<T: TryFrom<u64>>(self) -> T {
        T::try_from(self.0).ok().expect("MAX fits the type it was chosen for")
    }
}

impl<'de, const MAX: u64> Deserialize<'de> for UpTo<MAX> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Number<const MAX: u64>;
        impl<const MAX: u64> Visitor<'_> for Number<MAX> {
            type Value = UpTo<MAX>;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "an integer from 0 to {MAX}")
            }
            fn visit_u64<E: de::Error>(self, number: u64) -> Result<UpTo<MAX>, E> {
                if number > MAX {
                    return Err(E::invalid_value(de::Unexpected::Unsigned(number), &self));
                }
                Ok(UpTo(number))
            }
            fn visit_i64<E: de::Error>(self, number: i64) -> Result<UpTo<MAX>, E> {
                match u64::try_from(number) {
                    Ok(number) => self.visit_u64(number),
                    Err(_) => Err(E::invalid_value(de::Unexpected::Signed(number), &self)),
                }
            }
        }
        deserializer.deserialize_u64(Number)
    }
}

/// Words that stand for values, for `Deserialize`: the error then says which there are, whatever was written instead.
macro_rules! choice {
    ($type:ident { $($word:literal => $variant:ident),+ $(,)? }) => {
        impl<'de> serde::Deserialize<'de> for $type {
            fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                deserializer.deserialize_str($crate::config::value::Word(&[$(($word, Self::$variant)),+]))
            }
        }
    };
}
pub(super) use choice;

/// Visits one of the words.
pub(super) struct Word<T: 'static>(pub(super) &'static [(&'static str, T)]);

impl<T: Copy> Visitor<'_> for Word<T> {
    type Value = T;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("one of")?;
        self.0.iter().enumerate().try_for_each(|(at, (word, _))| {
            let separator = if at == 0 { " " } else { ", " };
            write!(f, "{separator}\"{word}\"")
        })
    }

    fn visit_str<E: de::Error>(self, text: &str) -> Result<T, E> {
        let found = self.0.iter().find(|(word, _)| *word == text);
        found.map(|(_, value)| *value).ok_or_else(|| E::invalid_value(de::Unexpected::Str(text), &self))
    }
}

/// What is written as a table; its fields may have rules among each other.
pub(super) trait Check {
    /// Refuses combinations that make no sense, naming the fields and what is allowed.
    fn check(&self) -> Result<(), String> {
        Ok(())
    }
}

/// A table and nothing else (`Deserialize` of a struct would take its fields as an array too), checked while its place
/// in the text is still known, so that the error can name the line.
#[derive(Debug)]
pub(super) struct Table<T>(pub(super) T);

impl<'de, T: Deserialize<'de> + Check> Deserialize<'de> for Table<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Fields<T>(PhantomData<T>);
        impl<'de, T: Deserialize<'de> + Check> Visitor<'de> for Fields<T> {
            type Value = Table<T>;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a table")
            }
            fn visit_map<A: de::MapAccess<'de>>(self, map: A) -> Result<Table<T>, A::Error> {
                let table = T::deserialize(de::value::MapAccessDeserializer::new(map))?;
                table.check().map_err(de::Error::custom)?;
                Ok(Table(table))
            }
        }
        deserializer.deserialize_map(Fields(PhantomData))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn endpoint_shown_lacks_user_and_query() {
        for (given, shown) in [
            ("http://p2p-proxy:65001", "http://p2p-proxy:65001"),
            ("http://me:word@p2p-proxy:65001/x/y?sig=1#f", "http://p2p-proxy:65001/x/y"),
            ("https://host/blob?X-Amz-Signature=secret", "https://host/blob"),
            ("me:word@registry:5000", "registry:5000"),
            ("http://me:wo/rd@host/", "http://(hidden)"),
            ("http://me:wo?rd@host/", "http://(hidden)"),
            ("http://a@b@host", "http://host"),
            ("/run/proxy.sock", "/run/proxy.sock"),
            ("", ""),
        ] {
            assert_eq!(Endpoint::from(given).to_string(), shown, "{given}");
            assert_eq!(format!("{:?}", Endpoint::from(given)), format!("{shown:?}"));
        }
    }

    #[test]
    fn secret_shown_is_hidden() {
        assert_eq!(format!("{:?}", Secret::new("word".into())), "(hidden)");
        assert_eq!(format!("{:?}", Secret::default()), "(none)");
    }
}
