"""What a run will need, from its settings alone: parameters, bytes, collectives, operations, time.

Each file answers one question with a table of terms, and each term has its formula beside it. A further way to divide
a run over processes is a further axis of `layout.Layout` and a further factor or term in the tables it touches.
"""
