"""The messages and tools of a job as the engine's chat formats take them."""

from mixfleet_broker.messages import ChatJob, ChatMessage
from mixfleet_engine.chat_format import Message, Tool, ToolCall


def engine_messages(job: ChatJob) -> list[Message]:
    """Return the job's conversation."""
    return [_message(message) for message in job.messages]


def offered_tools(job: ChatJob) -> list[Tool]:
    """Return the tools that the model is shown.

    None of them when it is to call none: no format has another way to say so. Tools that it must
    call are shown like those that it may; that it does is not the prompt's business.
    """
    if job.tool_choice == "none":
        return []
    return [
        Tool(name=tool.name, description=tool.description, parameters=tool.parameters)
        for tool in job.tools
    ]


def _message(message: ChatMessage) -> Message:
    return Message(
        role=message.role,
        content=message.content,
        tool_calls=tuple(
            ToolCall(call_id=call.call_id, name=call.name, arguments=call.arguments)
            for call in message.tool_calls
        ),
        call_id=message.call_id,
    )
