//! What one key of the guest's store does: the specification against which histories are checked. Written apart from the guest's code.

use std::sync::Arc;

use crate::real::resp::Reply;

/// What a client asks for. All of it is known to the KVM guest; the model machine knows all but [`Request::Swap`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Request {
    /// `GET`
    Get,
    /// `SET key value`
    Set(Arc<str>),
    /// `SET key value NX`: only where nothing is.
    SetNew(Arc<str>),
    /// `GETSET key value`
    Swap(Arc<str>),
    /// `DEL`
    Delete,
    /// `APPEND key more`
    Append(Arc<str>),
    /// `INCR`
    Increment,
    /// `RPUSH key item`
    Push(Arc<str>),
    /// `LRANGE key 0 -1`
    Range,
}

/// What a client is told.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Answer {
    /// Done.
    Ok,
    /// Nothing there, or not done.
    Nothing,
    /// A string.
    Text(Arc<str>),
    /// A number.
    Number(i64),
    /// A list.
    Items(Vec<Arc<str>>),
}

/// What a key holds.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub enum Value {
    /// Nothing.
    #[default]
    Absent,
    /// A string.
    Text(Arc<str>),
    /// A list.
    Items(Vec<Arc<str>>),
    /// What a request on a value of another type leaves behind: no answer fits.
    Broken,
}

impl Request {
    /// The command as it is sent.
    #[must_use]
    pub fn words<'a>(&'a self, key: &'a str) -> Vec<&'a str> {
        match self {
            Self::Get => vec!["GET", key],
            Self::Set(value) => vec!["SET", key, value],
            Self::SetNew(value) => vec!["SET", key, value, "NX"],
            Self::Swap(value) => vec!["GETSET", key, value],
            Self::Delete => vec!["DEL", key],
            Self::Append(more) => vec!["APPEND", key, more],
            Self::Increment => vec!["INCR", key],
            Self::Push(item) => vec!["RPUSH", key, item],
            Self::Range => vec!["LRANGE", key, "0", "-1"],
        }
    }

    /// What a key does with it.
    #[must_use]
    pub fn apply(&self, value: &Value) -> (Answer, Value) {
        let broken = (Answer::Nothing, Value::Broken);
        match (self, value) {
            (_, Value::Broken) => broken,
            (Self::Get, Value::Absent) => (Answer::Nothing, Value::Absent),
            (Self::Get, Value::Text(text)) => (Answer::Text(Arc::clone(text)), value.clone()),
            (Self::Set(new), _) => (Answer::Ok, Value::Text(Arc::clone(new))),
            (Self::SetNew(new), Value::Absent) => (Answer::Ok, Value::Text(Arc::clone(new))),
            (Self::SetNew(_), there) => (Answer::Nothing, there.clone()),
            (Self::Swap(new), Value::Absent) => (Answer::Nothing, Value::Text(Arc::clone(new))),
            (Self::Swap(new), Value::Text(old)) => (Answer::Text(Arc::clone(old)), Value::Text(Arc::clone(new))),
            (Self::Delete, Value::Absent) => (Answer::Number(0), Value::Absent),
            (Self::Delete, _) => (Answer::Number(1), Value::Absent),
            (Self::Append(more), Value::Absent) => (length(more.len()), Value::Text(Arc::clone(more))),
            (Self::Append(more), Value::Text(text)) => {
                let text = format!("{text}{more}");
                (length(text.len()), Value::Text(text.into()))
            }
            (Self::Increment, Value::Absent) => (Answer::Number(1), Value::Text("1".into())),
            (Self::Increment, Value::Text(text)) => match text.parse::<i64>().ok().and_then(|n| n.checked_add(1)) {
                Some(next) => (Answer::Number(next), Value::Text(next.to_string().into())),
                None => broken,
            },
            (Self::Push(item), Value::Absent) => (Answer::Number(1), Value::Items(vec![Arc::clone(item)])),
            (Self::Push(item), Value::Items(items)) => {
                let mut items = items.clone();
                items.push(Arc::clone(item));
                (length(items.len()), Value::Items(items))
            }
            (Self::Range, Value::Absent) => (Answer::Items(Vec::new()), Value::Absent),
            (Self::Range, Value::Items(items)) => (Answer::Items(items.clone()), value.clone()),
            (Self::Get | Self::Swap(_) | Self::Append(_) | Self::Increment, Value::Items(_))
            | (Self::Push(_) | Self::Range, Value::Text(_)) => broken,
        }
    }
}

fn length(len: usize) -> Answer {
    Answer::Number(i64::try_from(len).unwrap_or(i64::MAX))
}

impl TryFrom<Reply> for Answer {
    type Error = String;

    /// Reads a reply of the guest; an error reply is no answer to anything that is asked here.
    fn try_from(reply: Reply) -> Result<Self, String> {
        let text = |bytes: Vec<u8>| String::from_utf8(bytes).map(Arc::from).map_err(|e| format!("not text: {e}"));
        match reply {
            Reply::Simple(ok) if ok == "OK" => Ok(Self::Ok),
            Reply::Integer(number) => Ok(Self::Number(number)),
            Reply::Bulk(None) => Ok(Self::Nothing),
            Reply::Bulk(Some(bytes)) => text(bytes).map(Self::Text),
            Reply::Array(items) => {
                let item = |reply| match reply {
                    Reply::Bulk(Some(bytes)) => text(bytes),
                    other => Err(format!("not an item of a list: {other:?}")),
                };
                items.into_iter().map(item).collect::<Result<_, _>>().map(Self::Items)
            }
            other => Err(format!("{other:?}")),
        }
    }
}
