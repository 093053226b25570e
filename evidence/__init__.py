"""What a selection is worth: experiments on two models, their store and the document that is made of them."""
